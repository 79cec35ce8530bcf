from __future__ import annotations

import re
from typing import Any

import orjson
import pytest

from aserve.messages.inputs import OutputKind
from aserve.server.openai.protocol import ChatBody
from tests.server.conftest import events, make_app
from tests.server.fake_engine import TEXT, FakeEngine

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def body(**values: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": HELLO, "max_tokens": 4, **values}


async def ask(client: Any, **values: Any) -> dict[str, Any]:
    answer = await client.post(URL, json=body(**values))
    data = await answer.get_data()
    assert answer.status_code == 200, data
    return orjson.loads(data)


async def refusal(client: Any, **values: Any) -> dict[str, Any]:
    answer = await client.post(URL, json=body(**values))
    assert answer.status_code == 400, await answer.get_data()
    return await answer.get_json()


async def stream(client: Any, **values: Any) -> list[Any]:
    answer = await client.post(URL, json=body(stream=True, **values))
    data = await answer.get_data()
    assert answer.status_code == 200, data
    found = events(data)
    assert found.pop() == "[DONE]"
    return found


async def test_a_whole_answer(client: Any, engine: FakeEngine) -> None:
    answer = await ask(client)
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", answer.pop("id"))
    assert isinstance(answer.pop("created"), int)
    prompt = b"<user>hello<assistant>"
    assert answer == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "the "},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + 4, "completion_tokens": 4},
    }
    request = engine.submitted[0]
    assert request.ids == [*prompt]  # no special token beyond the template's
    assert request.params.temperature == 0.7
    assert request.kind is OutputKind.FINAL_ONLY


async def test_the_bytes_of_a_stream(client: Any) -> None:
    answer = await client.post(URL, json=body(stream=True, max_tokens=2))
    data = (await answer.get_data()).decode()
    data = re.sub(r'"chatcmpl-[0-9a-f]{32}","object":"chat.completion.chunk","created":\d+', '"ID"', data)
    head = 'data: {"id":"ID","model":"fake","choices":[{"index":0,"delta":'
    assert data == (
        head + '{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        + head + '{"content":"t"},"logprobs":null,"finish_reason":null}]}\n\n'
        + head + '{"content":"h"},"logprobs":null,"finish_reason":"length","stop_reason":null}]}\n\n'
        "data: [DONE]\n\n"
    )  # fmt: skip


async def test_streaming_choices(client: Any) -> None:
    chunks = await stream(client, n=3, stream_options={"include_usage": True})
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in chunks)
    for index in range(3):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert "".join(choice["delta"]["content"] for choice in own) == TEXT[index : index + 4]
        assert [choice["finish_reason"] for choice in own] == [None, None, None, None, "length"]


async def test_best_of_streams_the_winners_at_the_end(client: Any) -> None:
    chunks = await stream(client, n=2, best_of=4)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
    assert texts == {0: TEXT[2:6], 1: TEXT[3:7]}
    answer = await ask(client, n=2, best_of=4)
    assert [c["message"]["content"] for c in answer["choices"]] == [TEXT[2:6], TEXT[3:7]]


async def test_logprobs(client: Any) -> None:
    answer = await ask(client, logprobs=True, top_logprobs=2, max_tokens=3)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["t", "h", "e"]
    assert [entry["bytes"] for entry in content] == [[116], [104], [101]]
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2]
    for entry in content:
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
    # At the third place the chosen token is second best.
    assert content[2]["top_logprobs"][1] == {k: content[2][k] for k in ("token", "logprob", "bytes")}

    chunks = await stream(client, logprobs=True, top_logprobs=2, max_tokens=3)
    streamed = [e for c in chunks[1:] for e in c["choices"][0]["logprobs"]["content"]]
    assert streamed == content

    answer = await ask(client, logprobs=True, max_tokens=1)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_content_parts_roles_and_empty_messages(client: Any, engine: FakeEngine) -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "name": "x", "content": [{"type": "text", "text": part} for part in "ab"]},
        {"role": "anything", "content": "c"},
    ]  # fmt: skip
    await ask(client, messages=messages)
    assert engine.submitted[0].text == "<system>be kind<user>a\nb<anything>c<assistant>"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hello",
        [{"content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "assistant", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "forbidden", "content": "x"}],
    ],
)
async def test_bad_messages(client: Any, engine: FakeEngine, messages: Any) -> None:
    await refusal(client, messages=messages)
    assert not engine.submitted


async def test_the_templates_own_words_reach_the_client(client: Any) -> None:
    answer = await refusal(client, messages=[{"role": "forbidden", "content": "x"}])
    assert "this template knows no role forbidden" in answer["message"]


async def test_echo_continues_the_last_message(client: Any, engine: FakeEngine) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "well, "}]
    options = {"messages": messages, "echo": True, "add_generation_prompt": False}
    answer = await ask(client, **options)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "well, the "}
    assert engine.submitted[0].text == "<user>hello<assistant>well, "
    chunks = await stream(client, **options)
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == "well, the "
    # Without a reply in the same role there is nothing to continue.
    answer = await ask(client, echo=True)
    assert answer["choices"][0]["message"]["content"] == "the "


async def test_response_role(engine: FakeEngine) -> None:
    app = make_app(engine, response_role="pirate")
    async with app.test_app():
        answer = await ask(app.test_client())
        assert answer["choices"][0]["message"]["role"] == "pirate"
        answer = await ask(app.test_client(), add_generation_prompt=False)
        assert answer["choices"][0]["message"]["role"] == "user"


async def test_output_limits(client: Any, engine: FakeEngine) -> None:
    engine.model_config.max_model_len = 30  # the prompt has 22
    await ask(client, max_tokens=None)
    assert engine.submitted[-1].params.max_tokens == 8
    await ask(client, max_tokens=2, max_completion_tokens=3)
    assert engine.submitted[-1].params.max_tokens == 3
    await refusal(client, max_tokens=9)
    await refusal(client, max_tokens=0)
    engine.model_config.max_model_len = 22
    message = (await refusal(client, max_tokens=None))["message"]
    assert "22" in message


ACCEPTED: list[dict[str, Any]] = [
    {"tools": []},
    {"tools": [], "tool_choice": "auto"},
    {"tool_choice": "none"},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
    {"response_format": {"type": "text"}},
    {"user": "u", "metadata": {}, "store": True, "service_tier": "auto", "parallel_tool_calls": False},
    {"reasoning_effort": "low", "made_up": [1]},
    {"stop": None},
    {"stop": ["x"] * 16},
    {"temperature": 1, "top_p": 1},
    {"top_logprobs": 0},
    {"stream_options": None},
]


@pytest.mark.parametrize("values", ACCEPTED, ids=lambda values: ",".join(values))
async def test_accepted(client: Any, values: dict[str, Any]) -> None:
    await ask(client, **values)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"response_format": {"type": "poem"}}, "response_format"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": 2**200}, "n"),
    ({"n": "2"}, "n"),
    ({"n": True}, "n"),
    ({"n": 1.5}, "n"),
    ({"best_of": 9}, "best_of"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"n": 2, "best_of": 3, "temperature": 0}, "n"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": -1}, "max_completion_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e999}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 0}, "top_k"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop_token_ids": [256]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [2**40]}, "stop_token_ids"),
    ({"logit_bias": {"256": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"stream": "yes"}, "stream"),
]


@pytest.mark.parametrize(("values", "param"), REFUSED, ids=lambda value: repr(value)[:40])
async def test_refused(client: Any, engine: FakeEngine, values: dict[str, Any], param: str) -> None:
    # json.dumps writes 1e999 as Infinity, which is no JSON: sent as a literal that overflows.
    data = orjson.dumps(body()).decode()[:-1]
    for key, value in values.items():
        text = "1e999" if value == float("inf") else None
        data += f',"{key}":' + (text or _dump(value))
    answer = await client.post(URL, data=data + "}")
    assert answer.status_code == 400, await answer.get_data()
    error = await answer.get_json()
    assert error["param"] == param or (text is not None and error["param"] is None)
    assert len(error["message"]) < 400
    assert not engine.submitted


def _dump(value: Any) -> str:
    import json

    return json.dumps(value)


async def test_unknown_fields_are_named_once(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="aserve")
    for _ in range(3):
        await ask(client, made_up=1, other=2)
    lines = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert lines == ["request fields ignored: made_up, other"]


async def test_every_optional_field_may_be_null(client: Any) -> None:
    nulls = {name: None for name, field in ChatBody.model_fields.items() if not field.is_required()}
    answer = await client.post(URL, json={"model": "fake", "messages": HELLO, **nulls, "max_tokens": 3})
    assert answer.status_code == 200
