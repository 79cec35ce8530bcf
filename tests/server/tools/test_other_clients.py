"""Tools in the Responses and the Messages API with the official clients, on an engine that writes calls."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import openai
import pytest

from tests.server.conftest import make_app, running
from tests.server.tools.engine import TellingEngine
from tests.server.tools.test_chat_tools import CALL, CLOCK, TWO, WEATHER

QUESTION = "Weather in Paris?"
ASK: Any = [{"role": "user", "content": QUESTION}]
PARAMETERS = WEATHER["function"]["parameters"]
ARGUMENTS = {"city": "Paris", "days": 2}
FORCED = json.dumps(ARGUMENTS)
LISTED = json.dumps([{"name": "get_weather", "arguments": ARGUMENTS}, {"name": "clock", "arguments": {}}])

FLAT: list[Any] = [{"type": "function", **tool["function"]} for tool in (WEATHER, CLOCK)]
"""The tools as the Responses API has them; their shapes differ in every API."""
BLOCKS: list[Any] = [
    {"name": "get_weather", "description": "Tells the weather.", "input_schema": PARAMETERS},
    {"name": "clock", "input_schema": {"type": "object", "properties": {}}},
]

# How the three APIs spell a choice, what the model writes, and whether it writes a guided output.
RESPONSES = [
    ("auto", TWO, False),
    ("required", LISTED, True),
    ({"type": "function", "name": "get_weather"}, FORCED, True),
]
MESSAGES = [
    ({"type": "auto"}, TWO, False),
    ({"type": "any"}, LISTED, True),
    ({"type": "tool", "name": "get_weather"}, FORCED, True),
]
NAMES = ["auto", "required", "named"]


@asynccontextmanager
async def responses_of(engine: TellingEngine) -> AsyncIterator[Any]:
    async with (
        running(make_app(engine)) as port,
        openai.AsyncOpenAI(api_key="x", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client,
    ):
        yield client.responses


@asynccontextmanager
async def messages_of(engine: TellingEngine) -> AsyncIterator[Any]:
    async with (
        running(make_app(engine)) as port,
        anthropic.AsyncAnthropic(api_key="x", base_url=f"http://127.0.0.1:{port}", max_retries=0) as client,
    ):
        yield client.messages


def wanted_of(choice_name: str) -> list[tuple[str, dict[str, Any]]]:
    both = [("get_weather", ARGUMENTS), ("clock", {})]
    return both[:1] if choice_name == "named" else both


@pytest.mark.parametrize(("choice", "told", "guided"), RESPONSES, ids=NAMES)
async def test_responses(choice: Any, told: str, guided: bool, request: pytest.FixtureRequest) -> None:
    engine = TellingEngine(told, step=3)
    settings = {
        "model": "fake",
        "input": QUESTION,
        "tools": FLAT,
        "tool_choice": choice,
        "max_output_tokens": 500,
    }
    async with responses_of(engine) as api:
        whole = await api.create(**settings)
        async with api.stream(**settings) as stream:
            kinds = [event.type async for event in stream]
            pieced = await stream.get_final_response()
    wanted = wanted_of(request.node.callspec.id)
    for answer in (whole, pieced):
        assert answer.status == "completed"
        calls = [item for item in answer.output if item.type == "function_call"]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == wanted
        assert len({call.call_id for call in calls}) == len(calls)
        assert answer.output_text.strip() == ("" if guided else "Let me see.")
    assert kinds.count("response.function_call_arguments.done") == len(wanted)
    assert kinds.count("response.function_call_arguments.delta") > len(wanted)
    assert [each.params.guided is not None for each in engine.submitted] == [guided] * 2


@pytest.mark.parametrize(("choice", "told", "guided"), MESSAGES, ids=NAMES)
async def test_messages(choice: Any, told: str, guided: bool, request: pytest.FixtureRequest) -> None:
    engine = TellingEngine(told, step=3)
    settings = {"model": "fake", "messages": ASK, "tools": BLOCKS, "tool_choice": choice, "max_tokens": 500}
    async with messages_of(engine) as api:
        whole = await api.create(**settings)
        async with api.stream(**settings) as stream:
            deltas = [event.partial_json async for event in stream if event.type == "input_json"]
            pieced = await stream.get_final_message()
    wanted = wanted_of(request.node.callspec.id)
    for answer in (whole, pieced):
        assert answer.stop_reason == "tool_use"
        calls = [block for block in answer.content if block.type == "tool_use"]
        assert [(call.name, call.input) for call in calls] == wanted
        texts = [block.text.strip() for block in answer.content if block.type == "text"]
        assert texts == ([] if guided else ["Let me see."])
    assert len(deltas) > len(wanted)
    assert [each.params.guided is not None for each in engine.submitted] == [guided] * 2


async def test_a_result_sent_back_to_responses() -> None:
    engine = TellingEngine(CALL)
    async with responses_of(engine) as api:
        first = await api.create(model="fake", input=QUESTION, tools=FLAT, max_output_tokens=500)
        (call,) = first.output
        engine.texts = ("It is sunny.",)
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
        items = [*ASK, call.model_dump(), result]
        second = await api.create(model="fake", input=items, tools=FLAT, max_output_tokens=500)
        count = await api.input_tokens.count(model="fake", input=items, tools=FLAT)
    assert second.output_text == "It is sunny."
    assert count.input_tokens == second.usage.input_tokens
    user, assistant, tool = engine.tokenizer.conversation
    assert user["content"] == QUESTION
    assert assistant["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    assert (tool["role"], tool["content"], tool["tool_call_id"]) == ("tool", "sun", call.call_id)
    assert [shown["function"]["name"] for shown in engine.tokenizer.tools] == ["get_weather", "clock"]


async def test_a_result_sent_back_to_messages() -> None:
    engine = TellingEngine(CALL)
    async with messages_of(engine) as api:
        first = await api.create(model="fake", messages=ASK, tools=BLOCKS, max_tokens=500)
        (call,) = first.content
        engine.texts = ("It is sunny.",)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sun"}
        turns = [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        second = await api.create(model="fake", messages=turns, tools=BLOCKS, max_tokens=500)
        count = await api.count_tokens(model="fake", messages=turns, tools=BLOCKS)
    assert second.content[0].text == "It is sunny." and second.stop_reason == "end_turn"
    assert count.input_tokens == second.usage.input_tokens
    _, assistant, tool = engine.tokenizer.conversation
    assert assistant["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    assert (tool["role"], tool["content"], tool["tool_call_id"]) == ("tool", "sun", call.id)


async def test_some_of_the_tools_and_one_call_at_most() -> None:
    engine = TellingEngine(TWO)
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]}
    async with responses_of(engine) as api:
        values = {"model": "fake", "input": QUESTION, "tools": FLAT, "max_output_tokens": 500}
        await api.create(**values, tool_choice=choice)
        assert [shown["function"]["name"] for shown in engine.tokenizer.tools] == ["clock"]
        answer = await api.create(**values, parallel_tool_calls=False)
        assert [item.name for item in answer.output if item.type == "function_call"] == ["get_weather"]
        for wrong in (
            {"type": "allowed_tools", "mode": "auto", "tools": "clock"},
            {"type": "function", "name": "none"},
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await api.create(**values, tool_choice=wrong)
            assert caught.value.param == "tool_choice"
    async with messages_of(engine) as api:
        engine.failed = None
        answer = await api.create(
            model="fake", messages=ASK, tools=BLOCKS, max_tokens=500,
            tool_choice={"type": "auto", "disable_parallel_tool_use": True},
        )  # fmt: skip
        assert [block.name for block in answer.content if block.type == "tool_use"] == ["get_weather"]


async def test_an_answer_cut_off_in_a_call() -> None:
    engine = TellingEngine(FORCED)
    async with messages_of(engine) as api:
        choice = {"type": "tool", "name": "get_weather"}
        answer = await api.create(model="fake", messages=ASK, tools=BLOCKS, tool_choice=choice, max_tokens=6)
        assert answer.stop_reason == "max_tokens"
    engine.failed = None
    async with responses_of(engine) as api:
        named = {"type": "function", "name": "get_weather"}
        answer = await api.create(
            model="fake", input=QUESTION, tools=FLAT, tool_choice=named, max_output_tokens=6
        )
        assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"


async def test_a_tool_that_is_none_is_named() -> None:
    engine = TellingEngine(CALL)
    async with responses_of(engine) as api:
        with pytest.raises(openai.BadRequestError, match="name") as caught:
            await api.create(model="fake", input=QUESTION, tools=[{"type": "function", "name": "no spaces"}])
        assert caught.value.param == "tools"
    engine.failed = None
    async with messages_of(engine) as api:
        with pytest.raises(anthropic.BadRequestError, match="name"):
            await api.create(model="fake", messages=ASK, max_tokens=9, tools=[{**BLOCKS[0], "name": "a b"}])
