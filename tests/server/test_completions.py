from __future__ import annotations

import itertools
import re
from typing import Any

import orjson
import pytest

from aserve.messages.inputs import OutputKind
from tests.server.conftest import events
from tests.server.fake_engine import TEXT, FakeEngine

URL = "/v1/completions"


def body(**values: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "ab", "max_tokens": 5, **values}


async def ask(client: Any, **values: Any) -> dict[str, Any]:
    answer = await client.post(URL, json=body(**values))
    data = await answer.get_data()
    assert answer.status_code == 200, data
    assert answer.headers["Content-Type"] == "application/json"
    return orjson.loads(data)


async def stream(client: Any, **values: Any) -> list[Any]:
    answer = await client.post(URL, json=body(stream=True, **values))
    data = await answer.get_data()
    assert answer.status_code == 200, data
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["X-Accel-Buffering"] == "no"
    found = events(data)
    assert found.pop() == "[DONE]"
    return found


async def test_a_whole_answer(client: Any, engine: FakeEngine) -> None:
    answer = await ask(client)
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", answer.pop("id"))
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": "fake",
        "choices": [
            {"index": 0, "text": "the q", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ],
        "usage": {"prompt_tokens": 3, "total_tokens": 8, "completion_tokens": 5},
    }
    assert engine.submitted[0].kind is OutputKind.FINAL_ONLY
    assert engine.submitted[0].ids == [1, *b"ab"]
    assert not engine.aborted


async def test_the_bytes_of_a_stream(client: Any) -> None:
    answer = await client.post(URL, json=body(stream=True, max_tokens=2))
    data = (await answer.get_data()).decode()
    data = re.sub(r'"cmpl-[0-9a-f]{32}","object":"text_completion","created":\d+', '"ID"', data)
    head = 'data: {"id":"ID","model":"fake","choices":[{"index":0,"text":'
    assert data == (
        head + '"t","logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
        + head + '"h","logprobs":null,"finish_reason":"length","stop_reason":null}]}\n\n'
        "data: [DONE]\n\n"
    )  # fmt: skip


async def test_chunks_join_to_the_whole_answer(client: Any) -> None:
    whole = await ask(client, max_tokens=30)
    chunks = await stream(client, max_tokens=30)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_in_streams(client: Any) -> None:
    chunks = await stream(client, max_tokens=2, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None, None]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2}

    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(client, max_tokens=2, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 2]

    chunks = await stream(client, max_tokens=2, stream_options={})
    assert all("usage" not in chunk for chunk in chunks)


async def test_several_prompts_come_prompt_major(client: Any, engine: FakeEngine) -> None:
    answer = await ask(client, prompt=["a", "bc", "d"], n=2, max_tokens=3, add_special_tokens=False)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert [choice["text"] for choice in answer["choices"]] == ["the", "he "] * 3
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 22, "completion_tokens": 18}
    assert [request.id for request in engine.submitted] == [f"{answer['id']}-{i}" for i in range(3)]
    assert [request.ids for request in engine.submitted] == [[*b"a"], [*b"bc"], [*b"d"]]


@pytest.mark.parametrize("prompts", [1, 3])
async def test_streaming_several_prompts_and_choices(client: Any, prompts: int) -> None:
    chunks = await stream(client, prompt=["a", "bc", "d"][:prompts], n=2, max_tokens=4)
    texts: dict[int, str] = {}
    ends: dict[int, int] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        ends[choice["index"]] = ends.get(choice["index"], 0) + (choice["finish_reason"] == "length")
    assert texts == {i: TEXT[i % 2 : i % 2 + 4] for i in range(2 * prompts)}
    assert ends == dict.fromkeys(range(2 * prompts), 1)


async def test_best_of_is_one_event(client: Any, engine: FakeEngine) -> None:
    (event,) = await stream(client, best_of=4, n=2, max_tokens=3)
    assert [choice["index"] for choice in event["choices"]] == [0, 1]
    assert [choice["text"] for choice in event["choices"]] == [TEXT[2:5], TEXT[3:6]]
    assert event["usage"]["completion_tokens"] == 6
    assert engine.submitted[0].kind is OutputKind.FINAL_ONLY


PROMPT_FORMS: list[tuple[Any, list[list[int]]]] = [
    ("ab", [[1, *b"ab"]]),
    (["ab"], [[1, *b"ab"]]),
    ([5, 6, 7], [[5, 6, 7]]),
    ([0], [[0]]),
    ([[5], [0, 255]], [[5], [0, 255]]),
]


@pytest.mark.parametrize(("prompt", "ids"), PROMPT_FORMS)
async def test_prompt_forms(client: Any, engine: FakeEngine, prompt: Any, ids: list[list[int]]) -> None:
    await ask(client, prompt=prompt)
    assert [request.ids for request in engine.submitted] == ids


BAD_PROMPTS: list[Any] = [
    "", [], [[]], ["a", ""], [[1], []], [1, "a"], ["a", [1]], [[1, "a"]], [1.5], [True], [[True]], {"a": 1},
    7, [256], [-1], [[1], [2**70]], ["a"] * 2049,
]  # fmt: skip


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=lambda prompt: repr(prompt)[:20])
async def test_bad_prompts(client: Any, engine: FakeEngine, prompt: Any) -> None:
    answer = await client.post(URL, json=body(prompt=prompt))
    assert answer.status_code == 400
    assert (await answer.get_json())["param"] == "prompt"
    assert not engine.submitted


async def test_truncation_keeps_the_last_tokens(client: Any, engine: FakeEngine) -> None:
    await ask(client, prompt="abcdef", truncate_prompt_tokens=2)
    assert engine.submitted[0].ids == [*b"ef"]
    answer = await ask(client, prompt="abcdef", truncate_prompt_tokens=2, echo=True, max_tokens=1)
    assert answer["choices"][0]["text"] == "eft"
    assert answer["usage"]["prompt_tokens"] == 2


async def test_the_context_limit(client: Any, engine: FakeEngine) -> None:
    engine.model_config.max_model_len = 10
    await ask(client, prompt=[1, 2, 3, 4, 5], max_tokens=5)
    answer = await client.post(URL, json=body(prompt=[1, 2, 3, 4, 5], max_tokens=6))
    message = (await answer.get_json())["message"]
    assert answer.status_code == 400
    assert all(f" {number} " in message for number in (10, 11, 5, 6))


async def test_echo(client: Any) -> None:
    answer = await ask(client, echo=True, max_tokens=3)
    assert answer["choices"][0]["text"] == "abthe"
    chunks = await stream(client, echo=True, max_tokens=3, n=2)
    texts = [[c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i] for i in range(2)]
    assert texts == [["abt", "h", "e"], ["abh", "e", " "]]


async def test_max_tokens_0_gives_the_prompt_back(client: Any, engine: FakeEngine) -> None:
    answer = await ask(client, echo=True, max_tokens=0, logprobs=1)
    (choice,) = answer["choices"]
    assert choice["text"] == "ab"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["\x01", "a", "b"]
    assert answer["usage"]["completion_tokens"] == 1
    assert engine.submitted[0].params.max_tokens == 1
    (chunk,) = await stream(client, echo=True, max_tokens=0, logprobs=1)
    assert chunk["choices"] == answer["choices"]
    answer = await client.post(URL, json=body(max_tokens=0))
    assert answer.status_code == 400


async def test_logprobs(client: Any) -> None:
    answer = await ask(client, logprobs=2, max_tokens=3)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["t", "h", "e"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"] == pytest.approx([-0.1, -0.11, -0.22])
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]
    # The chosen token is second best at the third place, and is listed with the very same float.
    third = logprobs["top_logprobs"][2]
    assert third["e"] == logprobs["token_logprobs"][2]
    assert max(third.values()) == pytest.approx(-0.12)


async def test_logprobs_0_give_the_chosen_token_alone(client: Any) -> None:
    answer = await ask(client, logprobs=0, max_tokens=2)
    tops = answer["choices"][0]["logprobs"]["top_logprobs"]
    assert [list(top) for top in tops] == [["t"], ["h"]]


async def test_streamed_logprobs_join_to_the_whole(client: Any) -> None:
    for echo in (False, True):
        whole = await ask(client, logprobs=1, max_tokens=6, echo=echo)
        chunks = await stream(client, logprobs=1, max_tokens=6, echo=echo)
        joined: dict[str, list[Any]] = {}
        for chunk in chunks:
            for key, values in chunk["choices"][0]["logprobs"].items():
                joined.setdefault(key, []).extend(values)
        assert joined == whole["choices"][0]["logprobs"]


async def test_what_an_evaluation_harness_sends(client: Any, engine: FakeEngine) -> None:
    prompts = [[*b"one two"], [*b"three"]]
    answer = await ask(client, prompt=prompts, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["tokens"] == [chr(i) for i in ids] + ["t"]  # one token is appended, not more
        for token, value, top in list(
            zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        )[1:]:
            assert top[token] == value
    assert [request.params.prompt_logprobs for request in engine.submitted] == [1, 1]


async def test_corner_cases_never_fail_with_5xx(client: Any) -> None:
    axes: dict[str, list[Any]] = {
        "echo": [False, True],
        "max_tokens": [0, 1],
        "logprobs": [None, 0, 5, 6],
        "n": [1, 2],
        "best_of": [None, 3],
        "prompt": ["x", [], [0]],
        "stream": [False, True],
        "temperature": [0, 1],
    }
    seen = set()
    for values in itertools.product(*axes.values()):
        answer = await client.post(URL, json=body(**dict(zip(axes, values, strict=True))))
        data = await answer.get_data()
        seen.add(answer.status_code)
        if answer.mimetype == "text/event-stream":
            assert all("error" not in event for event in events(data)[:-1])
    assert seen == {200, 400}


async def test_sampling_fields_reach_the_engine(client: Any, engine: FakeEngine) -> None:
    values = {
        "n": 2, "best_of": 3, "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.5,
        "temperature": 2, "top_p": 0.5, "top_k": 7, "min_p": 0.25, "seed": -(2**63), "stop": ["x", "y"],
        "stop_token_ids": [3, 4], "include_stop_str_in_output": True, "ignore_eos": True, "min_tokens": 1,
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "max_tokens": 3.0,
    }  # fmt: skip
    await ask(client, **values, logit_bias={"5": 300})
    params = engine.submitted[0].params
    assert {name: getattr(params, name) for name in values} == values
    assert params.logit_bias == {5: 100.0}


async def test_null_means_default_everywhere(client: Any, engine: FakeEngine) -> None:
    from aserve.messages.params import SamplingParams
    from aserve.server.openai.protocol import CompletionBody

    nulls = dict.fromkeys(CompletionBody.model_fields)
    answer = await client.post(URL, json={**nulls, "model": "fake", "prompt": "x"})
    assert answer.status_code == 200
    assert repr(engine.submitted[0].params) == repr(SamplingParams())


async def test_the_engine_gets_ids_of_ours(client: Any, engine: FakeEngine) -> None:
    for given in ("a", "a", "x" * 1000):
        answer = await client.post(URL, json=body(), headers={"X-Request-Id": given})
        assert answer.headers["X-Request-Id"] == given[:128]
    ids = [request.id for request in engine.submitted]
    assert len(set(ids)) == 3
    assert all(re.fullmatch(r"cmpl-[0-9a-f]{32}-0", one) for one in ids)
    answer = await client.post(URL, json=body(), headers={"X-Request-Id": "a b\tc\xe9"})
    assert answer.headers["X-Request-Id"] == "a_b_c__"
