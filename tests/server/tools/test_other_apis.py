"""Tools in the APIs that are translated into chats."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from tests.server.conftest import make_app
from tests.server.tools.engine import TellingEngine

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WRITTEN = 'Let me see. <tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
FORCED = '[{"name": "get_weather", "arguments": {"city": "Paris"}}]'
RESPONSE: dict[str, Any] = {
    "model": "fake",
    "input": "Weather in Paris?",
    "tools": [{"type": "function", "name": "get_weather", "parameters": SCHEMA}],
}
MESSAGE: dict[str, Any] = {
    "model": "fake",
    "max_tokens": 500,
    "messages": [{"role": "user", "content": "Weather in Paris?"}],
    "tools": [{"name": "get_weather", "input_schema": SCHEMA}],
}


async def post(engine: TellingEngine, path: str, body: dict[str, Any]) -> bytes:
    app = make_app(engine)
    async with app.test_app():
        answer = await app.test_client().post(path, json=body)
        data: bytes = await answer.get_data()
        assert answer.status_code == 200, data
        return data


def payloads(data: bytes) -> list[dict[str, Any]]:
    lines = data.decode().splitlines()
    return [orjson.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize(("text", "choice"), [(WRITTEN, "auto"), (FORCED, "required")])
async def test_responses(text: str, choice: str) -> None:
    body = {**RESPONSE, "tool_choice": choice}
    answer = orjson.loads(await post(TellingEngine(text), "/v1/responses", body))
    *before, call = answer["output"]
    assert [item["type"] for item in before] == (["message"] if choice == "auto" else [])
    assert (call["type"], call["name"]) == ("function_call", "get_weather")
    assert json.loads(call["arguments"]) == {"city": "Paris"}
    events = payloads(await post(TellingEngine(text), "/v1/responses", {**body, "stream": True}))
    pieces = [each["delta"] for each in events if each["type"] == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call["arguments"]
    assert len(pieces) > 2


@pytest.mark.parametrize(("text", "choice"), [(WRITTEN, "auto"), (FORCED, "any")])
async def test_messages(text: str, choice: str) -> None:
    body = {**MESSAGE, "tool_choice": {"type": choice}}
    answer = orjson.loads(await post(TellingEngine(text), "/v1/messages", body))
    *before, call = answer["content"]
    assert [block["type"] for block in before] == (["text"] if choice == "auto" else [])
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "get_weather", {"city": "Paris"})
    assert answer["stop_reason"] == "tool_use"
    events = payloads(await post(TellingEngine(text), "/v1/messages", {**body, "stream": True}))
    deltas = [each["delta"] for each in events if each["type"] == "content_block_delta"]
    pieces = [delta["partial_json"] for delta in deltas if delta["type"] == "input_json_delta"]
    assert json.loads("".join(pieces)) == {"city": "Paris"}


async def test_tools_count_in_the_prompt() -> None:
    engine = TellingEngine("x")
    body = {key: value for key, value in MESSAGE.items() if key != "max_tokens"}
    await post(engine, "/v1/messages/count_tokens", body)
    assert [tool["function"]["name"] for tool in engine.tokenizer.tools] == ["get_weather"]
