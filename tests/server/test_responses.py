from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from typing import Any

import openai
import orjson
import pytest

from aserve.errors import RequestTimeoutError
from aserve.server.openai.chat import Begun
from aserve.server.openai.pieces import CallArguments, CallStart, Piece, Text
from aserve.server.openai.response_input import ResponseBody
from tests.server.conftest import make_app, running, until
from tests.server.fake_engine import TEXT, FakeEngine

URL = "/v1/responses"


def body(**values: Any) -> dict[str, Any]:
    return {"model": "alias", "input": "hello", "max_output_tokens": 4, **values}


async def ask(client: Any, **values: Any) -> dict[str, Any]:
    answer = await client.post(URL, json=body(**values))
    data = await answer.get_data()
    assert answer.status_code == 200, data
    return orjson.loads(data)


async def stream(client: Any, **values: Any) -> list[dict[str, Any]]:
    """The payloads of a stream's events, each checked against its event line and its place."""
    answer = await client.post(URL, json=body(stream=True, **values))
    data = (await answer.get_data()).decode()
    assert answer.status_code == 200, data
    assert "[DONE]" not in data
    found = []
    for number, event in enumerate(data.removesuffix("\n\n").split("\n\n")):
        name, payload = event.split("\n")
        found.append(orjson.loads(payload.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        assert found[-1]["sequence_number"] == number
    return found


async def test_a_whole_response(client: Any, engine: FakeEngine) -> None:
    engine.finish_reason = "stop"
    engine.cached = 3
    answer = await ask(client, metadata={"a": "b"}, temperature=0.5, instructions="be brief")
    prompt = b"<system>be brief<user>hello<assistant>"
    assert bytes(engine.submitted[0].ids) == prompt
    assert engine.submitted[0].params.temperature == 0.5
    (message,) = answer["output"]
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "annotations": [], "logprobs": [], "text": "the "}],
    }
    assert answer["id"].startswith("resp_")
    assert (answer["object"], answer["status"], answer["model"]) == ("response", "completed", "fake")
    assert answer["error"] is None and answer["incomplete_details"] is None
    assert (answer["metadata"], answer["instructions"], answer["store"]) == ({"a": "b"}, "be brief", False)
    assert answer["usage"] == {
        "input_tokens": len(prompt),
        "input_tokens_details": {"cached_tokens": 3},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(prompt) + 4,
    }


async def test_a_response_that_was_cut(client: Any) -> None:
    answer = await ask(client)
    assert answer["status"] == answer["output"][0]["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_the_order_of_events(client: Any, engine: FakeEngine) -> None:
    engine.finish_reason = "stop"
    events = await stream(client)
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 4,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    created, _, added, part, *_ = events
    assert created["response"]["status"] == "in_progress" and created["response"]["usage"] is None
    assert added["item"]["content"] == [] and added["item"]["status"] == "in_progress"
    assert part["part"]["text"] == ""
    assert {event.get("item_id", added["item"]["id"]) for event in events} == {added["item"]["id"]}
    assert "".join(event.get("delta", "") for event in events) == TEXT[:4]
    assert events[8]["text"] == events[9]["part"]["text"] == TEXT[:4]
    whole = events[-1]["response"]
    assert whole["output"] == [events[10]["item"]]
    assert whole["usage"]["output_tokens"] == 4
    assert whole["id"] == created["response"]["id"]
    # Streamed or not, it is the same object.
    other = await ask(client)
    for each in (whole, other):
        for key in ("id", "created_at", "completed_at"):
            each.pop(key)
        each["output"][0].pop("id")
    assert whole == other


async def test_an_incomplete_stream(client: Any) -> None:
    events = await stream(client)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_a_failure_in_the_stream(client: Any, engine: FakeEngine) -> None:
    engine.fail_after = 2
    engine.failure = RequestTimeoutError("too late")
    events = await stream(client)
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    assert response["status"] == "failed"
    assert response["error"] == {"code": "server_error", "message": "too late"}


async def test_logprobs(client: Any) -> None:
    answer = await ask(client, top_logprobs=2)
    entries = answer["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in entries] == list(TEXT[:4])
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    deltas = [event for event in await stream(client, include=["message.output_text.logprobs"])]
    streamed = [entry for event in deltas if "delta" in event for entry in event["logprobs"]]
    assert [entry["token"] for entry in streamed] == list(TEXT[:4])
    assert all(entry["top_logprobs"] == [] for entry in streamed)


ITEMS: list[tuple[list[dict[str, Any]], bytes]] = [
    ([{"role": "user", "content": "a"}], b"<user>a"),
    (
        [
            {"role": "developer", "content": "x"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "id": "r", "summary": []},
            {
                "type": "message",
                "role": "assistant",
                "id": "m",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "b", "annotations": []},
                    {"type": "refusal", "refusal": "c"},
                ],
            },
            {"role": "user", "content": "d"},
        ],
        b"<system>x<user>a<assistant>b\nc<user>d",
    ),
]


@pytest.mark.parametrize(("items", "prompt"), ITEMS)
async def test_items(client: Any, engine: FakeEngine, items: list[dict[str, Any]], prompt: bytes) -> None:
    await ask(client, input=items)
    assert bytes(engine.submitted[0].ids) == prompt + b"<assistant>"


async def test_leading_systems_are_one(client: Any, engine: FakeEngine) -> None:
    items = [{"role": "system", "content": "y"}, {"role": "user", "content": "a"}]
    await ask(client, input=items, instructions="x")
    assert bytes(engine.submitted[0].ids) == b"<system>x\n\ny<user>a<assistant>"


def test_calls_and_their_outputs_become_messages() -> None:
    items = [
        {"role": "user", "content": "weather?"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "id": "fc_1"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": '{"a":1}'},
        {"type": "function_call_output", "call_id": "1", "output": "sun"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "rain"}]},
    ]
    found = ResponseBody(model="m", input=items).messages()
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": '{"a":1}'}},
    ]
    assert found == [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
        {"role": "tool", "tool_call_id": "2", "content": "rain"},
    ]


def test_tools_and_formats_as_a_chat_has_them() -> None:
    schema = {"type": "object"}
    tools = [
        {"type": "web_search"},
        {"type": "function", "name": "f", "description": "d", "parameters": schema, "strict": True},
    ]
    asked = ResponseBody(
        model="m",
        input="x",
        tools=tools,
        tool_choice={"type": "function", "name": "f"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
    )
    function = {"name": "f", "description": "d", "parameters": schema, "strict": True}
    assert asked.functions() == [{"type": "function", "function": function}]
    assert asked.choice() == {"type": "function", "function": {"name": "f"}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert asked.response_format() == wanted


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "c"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
    ({"input": [{"type": "web_search_call"}]}, "input"),
    ({"input": [{"type": 0, "role": "user", "content": "x"}]}, "input"),
    ({"input": [{"role": "user"}]}, "input"),
    ({"input": [{"role": 1, "content": "x"}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
    ({"input": [{"role": "user", "content": "x"}] * 4097}, "input"),
    ({"input": [{"type": "function_call", "call_id": "1", "name": 3, "arguments": ""}]}, "input"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools"),
    ({"tools": [], "tool_choice": {"type": "mcp"}}, "tool_choice"),
    ({"reasoning": {"effort": "x" * 40}}, "reasoning"),
    ({"input": "y" * 5000}, "input"),
]


@pytest.mark.parametrize(("values", "param"), REFUSED, ids=lambda value: str(value)[:40])
async def test_refusals(client: Any, engine: FakeEngine, values: dict[str, Any], param: str) -> None:
    answer = await client.post(URL, json=body(**values))
    assert answer.status_code == 400, await answer.get_data()
    error = (await answer.get_json())["error"]
    assert error["param"] == param
    assert "max_tokens" not in error["message"] and "max_completion_tokens" not in error["message"]
    assert engine.submitted == []


async def test_a_limit_beyond_the_context_is_lowered(client: Any, engine: FakeEngine) -> None:
    engine.model_config.max_model_len = 40
    answer = await ask(client, max_output_tokens=32_000)
    assert answer["usage"]["total_tokens"] == 40


async def test_input_tokens(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    count = await api.responses.input_tokens.count(model="fake", input="hello", instructions="x")
    assert count.input_tokens == len(b"<system>x<user>hello<assistant>")
    assert engine.submitted == []


async def test_fields_without_effect(client: Any) -> None:
    await ask(
        client,
        store=True,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="k",
        service_tier="flex",
        safety_identifier="s",
        user="u",
        max_tool_calls=3,
        context_management=[],
        tools=[{"type": "web_search"}],
    )


class Script:
    """A reader that calls a tool between two texts."""

    def __init__(self) -> None:
        self.turns: list[list[Piece]] = [
            [Text("so ")],
            [CallStart("call_1", "f"), CallArguments('{"a"')],
            [CallArguments(":1}"), CallStart("call_2", "g"), CallArguments("{}")],
            [Text("done")],
        ]

    def feed(self, text: str, ended: bool) -> list[Piece]:
        if len(text) > 1:
            return [piece for turn in self.turns for piece in turn]
        return self.turns.pop(0)


async def test_calls_of_tools(client: Any, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Begun, "reader", lambda self: Script())
    engine.finish_reason = "stop"
    events = await stream(client)
    kinds = [event["type"].removeprefix("response.") for event in events]
    message = [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
    ]
    arguments = "function_call_arguments"
    call = ["output_item.added", f"{arguments}.delta", f"{arguments}.done", "output_item.done"]
    longer = [call[0], call[1], *call[1:]]
    assert kinds == ["created", "in_progress", *message, *longer, *call, *message, "completed"]
    places = [event["output_index"] for event in events if "output_index" in event]
    assert places == sorted(places) and set(places) == {0, 1, 2, 3}
    output = events[-1]["response"]["output"]
    assert [(item["type"], item.get("arguments")) for item in output] == [
        ("message", None),
        ("function_call", '{"a":1}'),
        ("function_call", "{}"),
        ("message", None),
    ]
    whole = (await ask(client))["output"]
    for item in (*output, *whole):
        item.pop("id")
    assert whole == output


# -------------------------------------------------------------------- the official client


def test_every_parameter_of_the_client_is_known() -> None:
    create = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:9").responses.create
    parameters = set(inspect.signature(create).parameters) - {"extra_headers", "extra_query", "extra_body"}
    assert parameters - set(ResponseBody.model_fields) == set()


@pytest.fixture
async def api(engine: FakeEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        running(make_app(engine, strict_fields=True)) as port,
        openai.AsyncOpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1/", max_retries=0) as client,
    ):
        yield client


async def test_create(api: openai.AsyncOpenAI) -> None:
    answer = await api.responses.create(model="fake", input="hello", max_output_tokens=5, store=False)
    assert answer.output_text == TEXT[:5]
    assert answer.status == "incomplete"
    assert answer.usage is not None and answer.usage.output_tokens == 5
    with pytest.raises(openai.BadRequestError, match="keeps no responses"):
        await api.responses.create(model="fake", input="hello", previous_response_id="resp_1")


async def test_the_accumulating_stream(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.finish_reason = "stop"
    options = {"model": "fake", "input": "hello", "max_output_tokens": 5}
    async with api.responses.stream(**options) as stream:
        text = "".join([e.delta async for e in stream if e.type == "response.output_text.delta"])
        final = await stream.get_final_response()
    assert text == final.output_text == TEXT[:5]
    assert final.status == "completed"


async def test_a_conversation_sent_back(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    first = await api.responses.create(model="fake", input="hello", max_output_tokens=4)
    items: list[Any] = [{"role": "user", "content": "hello"}, *first.output, {"role": "user", "content": "b"}]
    await api.responses.create(model="fake", input=items, max_output_tokens=4)
    assert bytes(engine.submitted[1].ids) == b"<user>hello<assistant>the <user>b<assistant>"


async def test_leaving_a_stream_aborts(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.tick = 0.002
    stream = await api.responses.create(model="fake", input="x", max_output_tokens=2000, stream=True)
    await anext(aiter(stream))
    await stream.close()
    await until(lambda: len(engine.aborted) == 1)
