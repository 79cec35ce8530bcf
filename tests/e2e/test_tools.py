"""Tools with a real model, whose template knows none: calls come from guided decoding or a named parser."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.e2e.process import Server, idle_afterwards

MODEL = "smollm2"
ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
        },
    },
}
PLACE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "set_place",
        "parameters": {
            "type": "object",
            "properties": {"at": {"$ref": "#/$defs/Place"}},
            "required": ["at"],
            "$defs": {
                "Place": {
                    "type": "object",
                    "properties": {"row": {"type": "integer", "minimum": 0, "maximum": 9}},
                    "required": ["row"],
                }
            },
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with (
        idle_afterwards(server),
        OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as made,
    ):
        yield made


def both(client: OpenAI, **values: Any) -> Iterator[Any]:
    """The choice of an answer in one piece, and of the client's accumulated stream, which must not be cut."""
    settings = {"model": MODEL, "messages": ASK, "temperature": 0, "max_tokens": 250, **values}
    yield client.chat.completions.create(**settings).choices[0]
    with client.chat.completions.stream(**settings) as stream:
        for _ in stream:
            pass
        yield stream.get_final_completion().choices[0]


def calls_of(choice: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]


def test_a_named_function_is_called(client: OpenAI) -> None:
    whole, streamed = both(client, tools=[WEATHER], tool_choice=NAMED)
    ((name, arguments),) = calls_of(whole)
    assert name == "get_weather"
    read = json.loads(arguments)
    assert set(read) == {"city", "unit"}
    assert read["unit"] in ("celsius", "fahrenheit")
    assert calls_of(streamed) == calls_of(whole)
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"
    assert whole.message.content is None


def test_a_call_is_required(client: OpenAI) -> None:
    settings = {"tools": [WEATHER, PLACE], "tool_choice": "required", "parallel_tool_calls": False}
    whole, streamed = both(client, **settings)
    ((name, arguments),) = calls_of(whole)
    assert name in ("get_weather", "set_place")
    assert isinstance(json.loads(arguments), dict)
    assert calls_of(streamed) == calls_of(whole)
    assert whole.finish_reason == "tool_calls"


def test_references_in_a_schema_hold(client: OpenAI) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "set_place"}}):
        whole, streamed = both(client, tools=[PLACE], tool_choice=choice, parallel_tool_calls=False)
        assert calls_of(streamed) == calls_of(whole)
        ((name, arguments),) = calls_of(whole)
        assert name == "set_place"
        assert 0 <= json.loads(arguments)["at"]["row"] <= 9


def test_a_conversation_with_a_result(client: OpenAI) -> None:
    function = {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "celsius"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny, 21 degrees."},
    ]
    whole, streamed = both(client, messages=messages, tools=[WEATHER], tool_choice="none")
    assert whole.message.content and whole.message.content == streamed.message.content
    assert whole.message.tool_calls is None


def test_tools_that_make_no_sense_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools"):
        bad = {"type": "object", "properties": {"a": {"type": "no such type"}}}
        tool: Any = {"type": "function", "function": {"name": "f", "parameters": bad}}
        client.chat.completions.create(model=MODEL, messages=ASK, tools=[tool], tool_choice="required")


def test_auto_without_a_flag(server: Server, client: OpenAI) -> None:
    """Whatever a model of this size makes of the tools, streamed and whole answers are the same."""
    assert "with the parser hermes" in server.log
    whole, streamed = both(client, tools=[WEATHER])
    assert whole.message.content or whole.message.tool_calls
    assert calls_of(streamed) == calls_of(whole)
    assert streamed.message.content == whole.message.content
    assert streamed.finish_reason == whole.finish_reason


def test_enabling_auto_needs_a_parser(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ tools }}{{ messages }}")
    flags = ("--enable-auto-tool-choice", "--port", "0", "--host", "127.0.0.1", "--chat-template", template)
    ended = subprocess.run(
        [sys.executable, "-m", "aserve", "serve", MODEL, *flags],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ended.returncode != 0
    assert "name one with --tool-call-parser" in ended.stderr
