"""Beams are those that transformers finds: tokens, order and scores."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from aserve import LLM, SamplingParams
from tests.parity.make_golden import load_oracle
from tests.parity.make_golden_beams import PATH, PLACES, cases, search
from tests.parity.prompts import NUM_TOKENS, PROMPTS

pytestmark = pytest.mark.timeout(900)


def entries() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(PATH.read_text())
    return found


def params(entry: dict[str, Any], **options: Any) -> SamplingParams:
    return SamplingParams(
        use_beam_search=True,
        n=entry["width"],
        best_of=entry["width"],
        temperature=0,
        max_tokens=NUM_TOKENS,
        stop_token_ids=entry["ends"],
        **{**entry["mode"], **options},
    )


def check(llm: LLM, chosen: list[dict[str, Any]]) -> None:
    outputs = llm.generate(
        prompt_token_ids=[entry["ids"] for entry in chosen],
        sampling_params=[params(entry) for entry in chosen],
        use_tqdm=False,
    )
    for entry, output in zip(chosen, outputs, strict=True):
        case = entry["width"], entry["mode"], len(entry["ends"]), PROMPTS[entry["place"]]
        assert [each.token_ids for each in output.outputs] == [tokens for tokens, _ in entry["found"]], case
        power = entry["mode"]["length_penalty"]
        scores = [each.cumulative_logprob / len(each.token_ids) ** power for each in output.outputs]
        assert scores == pytest.approx([score for _, score in entry["found"]], rel=1e-4, abs=1e-4), case
    core = llm.llm_engine.core
    assert core.blocks.num_free == core.blocks.num_blocks
    core.verify()


def build(**options: Any) -> LLM:
    return LLM("smollm2", dtype="float32", **{"max_model_len": 512, "max_num_seqs": 64, **options})


def test_every_prompt_width_and_mode_is_there() -> None:
    found = [(each["place"], each["width"], bool(each["ends"]), each["mode"]) for each in entries()]
    assert found == [
        (place, width, bool(ends), mode) for place in PLACES for width, ends, mode in cases(place)
    ]


def test_each_prompt_in_some_modes() -> None:
    """Every prompt without and with tokens that end it, both widths and all modes, in one batch."""
    found = entries()
    plain = [each for each in found if not each["ends"]]
    ending = [each for each in found if each["ends"]]
    chosen = plain[::5] + ending[:16][6::8] + ending[1::9]
    assert {each["place"] for each in chosen} == set(PLACES) and len(chosen) < 20
    with build() as llm:
        check(llm, chosen)


@pytest.mark.slow
def test_every_mode() -> None:
    with build() as llm:
        check(llm, entries())


POLICIES: dict[str, dict[str, Any]] = {
    "swap": {"num_gpu_blocks_override": 48, "preemption_mode": "swap"},
    "recompute": {"num_gpu_blocks_override": 48, "preemption_mode": "recompute"},
    "recompute caching": {
        "num_gpu_blocks_override": 48,
        "preemption_mode": "recompute",
        "enable_prefix_caching": True,
    },
    "chunks": {"enable_chunked_prefill": True, "max_num_batched_tokens": 20, "max_num_seqs": 20},
    "one by one": {"overlap": 0, "block_size": 8, "max_num_seqs": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_change_nothing(policy: str) -> None:
    options = POLICIES[policy]
    with build(**options) as llm:
        check(llm, entries()[::7])
        assert (llm.llm_engine.core.num_preemptions > 0) == ("num_gpu_blocks_override" in options)


@pytest.mark.slow
def test_the_golden_file_is_what_transformers_says() -> None:
    model, tokenizer = load_oracle("smollm2")
    for entry in (entries()[3], entries()[-5]):
        ends = [tokenizer.eos_token_id, *entry["ends"]]
        with torch.inference_mode():
            fresh = search(model, entry["ids"], entry["width"], ends, entry["mode"])
        assert [tokens for tokens, _ in fresh] == [tokens for tokens, _ in entry["found"]]
        scores = [score for _, score in entry["found"]]
        assert [score for _, score in fresh] == pytest.approx(scores, rel=1e-4, abs=1e-4)
