from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import orjson
import pytest

from aserve.errors import EngineBusyError, QueueFullError
from aserve.server.anthropic.body import CountBody, MessagesBody
from aserve.server.openai.chat import Begun
from tests.server.conftest import make_app, running, until
from tests.server.fake_engine import TEXT, FakeEngine
from tests.server.test_responses import Script

URL = "/v1/messages"
HELLO = [{"role": "user", "content": "hello"}]


def body(**values: Any) -> dict[str, Any]:
    return {"model": "alias", "messages": HELLO, "max_tokens": 4, **values}


async def ask(client: Any, path: str = URL, **values: Any) -> dict[str, Any]:
    answer = await client.post(path, json=values)
    data = await answer.get_data()
    assert answer.status_code == 200, data
    return orjson.loads(data)


async def stream(client: Any, **values: Any) -> list[dict[str, Any]]:
    answer = await client.post(URL + "?beta=true", json=body(stream=True, **values))
    data = (await answer.get_data()).decode()
    assert answer.status_code == 200, data
    assert "[DONE]" not in data
    found = []
    for event in data.removesuffix("\n\n").split("\n\n"):
        name, payload = event.split("\n")
        found.append(orjson.loads(payload.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


async def test_a_whole_message(client: Any, engine: FakeEngine) -> None:
    engine.cached = 5
    answer = await ask(client, **body(system="be brief", temperature=0.3, top_k=7, stop_sequences=["@"]))
    assert answer.pop("id").startswith("msg_")
    prompt = b"<system>be brief<user>hello<assistant>"
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "fake",
        "content": [{"type": "text", "text": "the "}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(prompt) - 5,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 5,
            "output_tokens": 4,
        },
    }
    (request,) = engine.submitted
    assert bytes(request.ids) == prompt
    assert (request.params.temperature, request.params.top_k, request.params.stop) == (0.3, 7, ["@"])
    await ask(client, **body())
    assert engine.submitted[1].params.temperature == 1.0


async def test_the_order_of_events(client: Any, engine: FakeEngine) -> None:
    engine.finish_reason = "stop"
    events = await stream(client)
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 4,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = events[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None
    assert start["usage"]["input_tokens"] == len(b"<user>hello<assistant>")
    assert events[1] == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    deltas = [event["delta"] for event in events[2:6]]
    assert {delta["type"] for delta in deltas} == {"text_delta"}
    assert "".join(delta["text"] for delta in deltas) == TEXT[:4]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 4


async def test_a_failure_in_the_stream(client: Any, engine: FakeEngine) -> None:
    engine.fail_after = 2
    events = await stream(client)
    assert events[-1]["type"] == "error"
    assert events[-1]["error"] == {"type": "overloaded_error", "message": "failed on demand"}


async def test_a_stop_sequence(client: Any, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from aserve.messages.outputs import CompletionOutput
    from tests.server import fake_engine

    def ended(**values: Any) -> CompletionOutput:
        output = CompletionOutput(**values)
        output.stop_reason = "fox" if output.finish_reason else None
        return output

    engine.finish_reason = "stop"
    monkeypatch.setattr(fake_engine, "CompletionOutput", ended)
    answer = await ask(client, **body())
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "fox")


async def test_calls_of_tools(client: Any, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Begun, "reader", lambda self: Script())
    engine.finish_reason = "stop"
    events = await stream(client)
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert [event["type"] for event in events] == [
        "message_start",
        *block,
        *[block[0], block[1], *block[1:]],
        *block,
        *block,
        "message_delta",
        "message_stop",
    ]
    places = [event["index"] for event in events if "index" in event]
    assert places == sorted(places) and set(places) == {0, 1, 2, 3}
    begins = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert begins[1] == {"type": "tool_use", "id": "call_1", "name": "f", "input": {}}
    pieces = [e["delta"]["partial_json"] for e in events if "partial_json" in e.get("delta", {})]
    assert pieces == ['{"a"', ":1}", "{}"]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    answer = await ask(client, **body())
    assert answer["stop_reason"] == "tool_use"
    assert answer["content"] == [
        {"type": "text", "text": "so "},
        {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "call_2", "name": "g", "input": {}},
        {"type": "text", "text": "done"},
    ]


def test_blocks_become_messages() -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "b"},
                {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "c"}]},
                {"type": "tool_result", "tool_use_id": "2"},
                {"type": "text", "text": "d"},
                {"type": "text", "text": "e"},
            ],
        },
    ]
    system = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    found = CountBody(model="m", messages=turns, system=system).chat_messages()
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    assert found == [
        {"role": "system", "content": "x\ny"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "c"},
        {"role": "tool", "tool_call_id": "2", "content": ""},
        {"role": "user", "content": "d\ne"},
    ]


def test_tools_as_a_chat_has_them() -> None:
    schema = {"type": "object"}
    tools = [
        {"name": "f", "description": "d", "input_schema": schema},
        {"type": "web_search_20250305", "name": "web_search"},
    ]
    for choice, wanted in [
        (None, None),
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ]:
        asked = CountBody(model="m", messages=HELLO, tools=tools, tool_choice=choice)
        assert asked.choice() == wanted
    function = {"name": "f", "description": "d", "parameters": schema}
    assert asked.functions() == [{"type": "function", "function": function}]
    format = {"format": {"type": "json_schema", "schema": schema}}
    asked = CountBody(model="m", messages=HELLO, output_config=format)
    wanted = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
    assert asked.response_format() == wanted


async def test_thinking_is_a_variable(client: Any, engine: FakeEngine) -> None:
    for kind, wanted in [("enabled", True), ("adaptive", True), ("disabled", False)]:
        await ask(client, **body(thinking={"type": kind, "budget_tokens": 1024}))
        assert engine.tokenizer.variables["enable_thinking"] is wanted


async def test_an_answer_that_has_begun_is_gone_on_with(client: Any, engine: FakeEngine) -> None:
    answer = await ask(client, **body(messages=[*HELLO, {"role": "assistant", "content": "{"}]))
    assert bytes(engine.submitted[0].ids) == b"<user>hello<assistant>{"
    assert answer["content"] == [{"type": "text", "text": "the "}]


async def test_count_tokens(client: Any, engine: FakeEngine) -> None:
    path = URL + "/count_tokens"
    answer = await ask(client, path, model="fake", messages=HELLO, system="x")
    assert answer == {"input_tokens": len(b"<system>x<user>hello<assistant>")}
    assert engine.submitted == []
    assert (await client.post(path, json={"model": "nope", "messages": HELLO})).status_code == 404


async def test_a_limit_beyond_the_context_is_lowered(client: Any, engine: FakeEngine) -> None:
    engine.model_config.max_model_len = 40
    answer = await ask(client, **body(max_tokens=32_000))
    assert answer["usage"]["output_tokens"] == 40 - len(b"<user>hello<assistant>")


USE = {"type": "tool_use", "id": "1", "name": "f"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": HELLO * 4097}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages.0.content.0.text"),
    ({"system": [{"type": "image"}]}, "system.0"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    ({"tool_choice": {"type": "some"}}, "tool_choice"),
    ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": {}}}, "disable_parallel_tool_use"),
    (
        {"messages": [{"role": "assistant", "content": [{**USE, "input": ["x"]}]}]},
        "messages.0.content.0.input",
    ),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"output_config": {"format": {"type": "regex"}}}, "output_config"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "context"),
]


@pytest.mark.parametrize(("values", "says"), REFUSED, ids=lambda value: str(value)[:40])
async def test_refusals(client: Any, engine: FakeEngine, values: dict[str, Any], says: str) -> None:
    answer = await client.post(URL, json=body(**values))
    assert answer.status_code == 400, await answer.get_data()
    found = await answer.get_json()
    assert found["type"] == "error" and found["request_id"].startswith("req_")
    assert found["error"]["type"] == "invalid_request_error"
    assert says in found["error"]["message"]
    assert engine.submitted == []


async def test_the_shape_of_every_error(engine: FakeEngine) -> None:
    app = make_app(engine, api_key=["k"], max_body_size=500)
    async with app.test_app():
        client = app.test_client()
        key = {"X-Api-Key": "k"}

        async def kind(status: int, headers: dict[str, str] = key, **values: Any) -> str:
            answer = await client.post(URL, json=body(**values), headers=headers)
            assert answer.status_code == status
            found = await answer.get_json()
            assert set(found) == {"type", "error", "request_id"}
            if status in (429, 503):
                assert "Retry-After" in answer.headers
            return str(found["error"]["type"])

        assert (await client.post(URL, json=body(), headers=key)).status_code == 200
        assert (await client.post(URL, json=body(), headers={"Authorization": "Bearer k"})).status_code == 200
        assert await kind(401, {}) == "authentication_error"
        assert await kind(401, {"X-Api-Key": "wrong"}) == "authentication_error"
        assert (await client.get("/v1/models", headers=key)).status_code == 401
        assert await kind(404, model="nope") == "not_found_error"
        assert await kind(413, system="x" * 600) == "request_too_large"
        engine.full = QueueFullError("full")
        assert await kind(429) == "rate_limit_error"
        engine.full, engine.fail_after, engine.failure = None, 0, EngineBusyError("busy")
        assert await kind(503) == "overloaded_error"
        engine.tokenizer.apply_chat_template = None  # type: ignore[method-assign, assignment]
        answer = await client.post(URL, data=b"{", headers=key)
        assert (await answer.get_json())["error"]["type"] == "invalid_request_error"


# -------------------------------------------------------------------- the official client


@pytest.fixture
async def api(engine: FakeEngine) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with (
        running(make_app(engine, api_key=["the-key"], strict_fields=True)) as port,
        anthropic.AsyncAnthropic(
            api_key="the-key", base_url=f"http://127.0.0.1:{port}", max_retries=0
        ) as client,
    ):
        yield client


def test_every_parameter_of_the_client_is_known() -> None:
    client = anthropic.Anthropic(api_key="none", base_url="http://127.0.0.1:9")
    transport = {"extra_headers", "extra_query", "extra_body", "timeout"}
    for method, kind in ((client.messages.create, MessagesBody), (client.messages.count_tokens, CountBody)):
        parameters = set(inspect.signature(method).parameters) - transport
        assert parameters - set(kind.model_fields) == set()


async def test_create(api: anthropic.AsyncAnthropic) -> None:
    answer = await api.messages.create(model="fake", max_tokens=5, messages=HELLO)  # type: ignore[arg-type]
    (block,) = answer.content
    assert block.type == "text" and block.text == TEXT[:5]
    assert answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 5
    count = await api.messages.count_tokens(model="fake", messages=HELLO)  # type: ignore[arg-type]
    assert count.input_tokens == answer.usage.input_tokens


async def test_the_accumulating_stream(api: anthropic.AsyncAnthropic, engine: FakeEngine) -> None:
    engine.finish_reason = "stop"
    async with api.messages.stream(model="fake", max_tokens=5, messages=HELLO) as stream:  # type: ignore[arg-type]
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == TEXT[:5]
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == 5


async def test_streamed_calls_of_tools(
    api: anthropic.AsyncAnthropic, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Begun, "reader", lambda self: Script())
    engine.finish_reason = "stop"
    async with api.messages.stream(model="fake", max_tokens=4, messages=HELLO) as stream:  # type: ignore[arg-type]
        final = await stream.get_final_message()
    calls = [(block.name, block.input) for block in final.content if block.type == "tool_use"]
    assert calls == [("f", {"a": 1}), ("g", {})]


async def test_errors(api: anthropic.AsyncAnthropic, engine: FakeEngine) -> None:
    options: dict[str, Any] = {"max_tokens": 5, "messages": HELLO}
    with pytest.raises(anthropic.NotFoundError, match="`nope`"):
        await api.messages.create(model="nope", **options)
    with pytest.raises(anthropic.BadRequestError, match="top_p"):
        await api.messages.create(model="fake", extra_body={"top_p": 0}, **options)
    with pytest.raises(anthropic.AuthenticationError):
        await api.with_options(api_key="wrong").messages.create(model="fake", **options)
    engine.fail_after = 2
    stream = await api.messages.create(model="fake", stream=True, **options)
    with pytest.raises(anthropic.APIStatusError, match="failed on demand"):
        async for _ in stream:
            pass


async def test_leaving_a_stream_aborts(api: anthropic.AsyncAnthropic, engine: FakeEngine) -> None:
    engine.tick = 0.002
    stream = await api.messages.create(model="fake", max_tokens=2000, messages=HELLO, stream=True)  # type: ignore[arg-type]
    await anext(aiter(stream))
    await stream.close()
    await until(lambda: len(engine.aborted) == 1)
