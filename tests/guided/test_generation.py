"""Guided outputs of the whole engine, with a real model."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from aserve import LLM, GuidedParams, SamplingParams
from aserve.errors import InvalidRequestError, RequestFailedError
from tests.guided.fakes import FixedOutput
from tests.guided.schemas import SCHEMAS

PROMPT = "Answer in JSON: "


def generate(llm: LLM, params: list[SamplingParams], prompt: str = PROMPT) -> list[Any]:
    return llm.generate([prompt] * len(params), params, use_tqdm=False)


def ids(output: Any) -> list[list[int]]:
    return [list(each.token_ids) for each in output.outputs]


@pytest.mark.parametrize(("temperature", "most", "least"), [(0.0, 80, 15), (3.0, 50, 6)])
def test_finished_outputs_are_valid_under_their_schema(
    llm: LLM, temperature: float, most: int, least: int
) -> None:
    params = [
        SamplingParams(temperature=temperature, seed=3, max_tokens=most, guided=GuidedParams(json=schema))
        for schema in SCHEMAS.values()
    ]
    finished = 0
    for name, output in zip(SCHEMAS, generate(llm, params), strict=True):
        (each,) = output.outputs
        if each.finish_reason == "stop":
            finished += 1
            jsonschema.validate(json.loads(each.text), SCHEMAS[name])
    assert finished >= least


@pytest.mark.parametrize("backend", ["outlines", "lm-format-enforcer"])
def test_other_backends(llm: LLM, backend: str) -> None:
    guides = [
        GuidedParams(json=SCHEMAS["verdict"], backend=backend),
        GuidedParams(regex="[a-z]{3,6}-[0-9]{2}", backend=backend),
        GuidedParams(choice=["red", "green"], backend=backend),
        GuidedParams(grammar='start: "a" start "b" | "c"', backend=backend),
    ]
    outputs = generate(llm, [SamplingParams(temperature=1.5, max_tokens=40, guided=each) for each in guides])
    texts = [output.outputs[0].text for output in outputs]
    jsonschema.validate(json.loads(texts[0]), SCHEMAS["verdict"])
    assert re.fullmatch("[a-z]{3,6}-[0-9]{2}", texts[1])
    assert texts[2] in ("red", "green")
    assert re.fullmatch("a*cb*", texts[3]) or outputs[3].outputs[0].finish_reason == "length"


def test_json_object_and_strings_of_schemas(llm: LLM) -> None:
    guides = [GuidedParams(json_object=True), GuidedParams(json=json.dumps(SCHEMAS["answer"]))]
    first, second = generate(llm, [SamplingParams(temperature=0, max_tokens=100, guided=g) for g in guides])
    assert first.outputs[0].text.startswith("{")
    jsonschema.validate(json.loads(second.outputs[0].text), SCHEMAS["answer"])


def test_every_fork_follows_the_guide(llm: LLM) -> None:
    guided = GuidedParams(regex="[0-9]{4}-[0-9]{2}")
    (output,) = generate(llm, [SamplingParams(n=8, temperature=2.0, seed=1, max_tokens=30, guided=guided)])
    texts = [each.text for each in output.outputs]
    assert all(re.fullmatch("[0-9]{4}-[0-9]{2}", text) for text in texts)
    assert len(set(texts)) > 1


def mixed() -> list[SamplingParams]:
    """Plain and guided requests, greedy and drawn."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "guided": GuidedParams(json=SCHEMAS["person"])},
        {"temperature": 0.9, "seed": 1},
        {"temperature": 0.9, "seed": 2, "guided": GuidedParams(json=SCHEMAS["weather_call"])},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0, "logprobs": 2, "guided": GuidedParams(choice=["left", "right"])},
        {"temperature": 1.2, "top_k": 20, "seed": 3},
        {
            "temperature": 1.2,
            "repetition_penalty": 1.2,
            "seed": 4,
            "guided": GuidedParams(regex="[a-z ]{20}"),
        },
    ]
    return [SamplingParams(max_tokens=24, **each) for each in kinds]


def told(output: Any) -> Any:
    (each,) = output.outputs
    return list(each.token_ids), each.text, each.cumulative_logprob, each.logprobs


def test_rows_are_bit_identical_alone_and_in_a_mixed_batch(llm: LLM) -> None:
    alone = [told(generate(llm, [each])[0]) for each in mixed()]
    assert [told(output) for output in generate(llm, mixed())] == alone


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preemption_keeps_the_place_in_the_grammar(llm: LLM, mode: str) -> None:
    params = [
        SamplingParams(temperature=1.5, seed=i, max_tokens=60, guided=GuidedParams(regex="([a-z]{3} ){30}"))
        for i in range(5)
    ]
    wanted = [ids(output) for output in generate(llm, params)]
    with LLM(
        "smollm2",
        max_model_len=160,
        max_num_seqs=8,
        num_gpu_blocks_override=18,
        block_size=16,
        preemption_mode=mode,
    ) as small:
        found = [ids(output) for output in generate(small, params)]
        assert small.llm_engine.core.num_preemptions > 0
    assert found == wanted


def test_ends_and_limits(llm: LLM) -> None:
    yes = GuidedParams(choice=["yes"])
    words = GuidedParams(regex="(one |two ){1,9}")
    params = [
        SamplingParams(temperature=0, max_tokens=20, guided=yes),
        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, guided=yes),
        SamplingParams(temperature=0, max_tokens=20, min_tokens=6, guided=yes),
        SamplingParams(temperature=0, max_tokens=60, min_tokens=20, guided=words),
        SamplingParams(temperature=0, max_tokens=3, guided=words),
        SamplingParams(temperature=0, stop=[" two"], guided=GuidedParams(regex="one two three")),
        SamplingParams(temperature=0, max_tokens=5, logit_bias={2: -100}, guided=yes),
    ]
    found = [output.outputs[0] for output in generate(llm, params)]
    assert [(each.text, each.finish_reason) for each in found[:3]] == [
        ("yes", "stop"),
        ("yes", "length"),
        ("yes", "stop"),
    ]
    assert len(found[1].token_ids) == 9 and len(found[2].token_ids) >= 6
    assert len(found[3].token_ids) >= 20 and re.fullmatch("(one |two ){1,9}", found[3].text)
    assert found[4].finish_reason == "length" and "one two ".startswith(found[4].text[:4])
    assert (found[5].text, found[5].finish_reason, found[5].stop_reason) == ("one", "stop", " two")
    assert (found[6].text, found[6].finish_reason) == ("yes", "stop")


def test_a_processor_cannot_bring_forbidden_tokens_back(llm: LLM) -> None:
    def favour(output_ids: list[int], row: Any) -> Any:
        row[:] = 0.0
        row[100] = 50.0
        return row

    params = SamplingParams(
        temperature=0, max_tokens=10, logits_processors=[favour], guided=GuidedParams(choice=["up", "down"])
    )
    assert generate(llm, [params])[0].outputs[0].text in ("up", "down")


def test_returned_logprobs_are_those_of_what_is_allowed(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=2, guided=GuidedParams(regex="[ab]"))
    (entry,) = generate(llm, [params])[0].outputs[0].logprobs
    assert sum(2.718281828459045**each.logprob for each in entry.values()) == pytest.approx(1.0, abs=1e-3)


def test_a_matcher_that_fails_ends_its_own_request_only(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SamplingParams(temperature=0, max_tokens=12)
    wanted = ids(generate(llm, [plain])[0])
    guides = llm.llm_engine.input.guides
    monkeypatch.setattr(guides, "_compile", lambda spec: FixedOutput([100, 200, 300], fails_at=2))
    broken = SamplingParams(temperature=0, max_tokens=12, guided=GuidedParams(regex="breaks"))
    with pytest.raises(InvalidRequestError, match="its guide cannot be followed") as refused:
        generate(llm, [broken, plain])
    assert refused.value.param == "guided_regex"
    monkeypatch.setattr(FixedOutput, "fails_with", RuntimeError)
    broken.guided = GuidedParams(regex="breaks again")
    with pytest.raises(RequestFailedError, match="its guide failed"):
        generate(llm, [broken, plain])
    assert ids(generate(llm, [plain])[0]) == wanted


@pytest.mark.parametrize(
    ("guided", "param"),
    [
        (GuidedParams(regex="(a"), "guided_regex"),
        (GuidedParams(grammar="start: nowhere"), "guided_grammar"),
        (GuidedParams(json={"type": "poem"}), "guided_json"),
        (GuidedParams(json='{"type": '), "guided_json"),
        (GuidedParams(json="[1]"), "guided_json"),
        (GuidedParams(json={"unevaluatedProperties": False}, source="response_format"), "response_format"),
        (GuidedParams(json={"multipleOf": 3}, backend="outlines"), "guided_json"),
        (GuidedParams(regex="a", backend="none of these"), "guided_decoding_backend"),
    ],
)
def test_bad_guides_are_refused_by_name(llm: LLM, guided: GuidedParams, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        generate(llm, [SamplingParams(guided=guided)])
    assert caught.value.param == param
    assert caught.value.message.startswith(param)
