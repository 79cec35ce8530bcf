"""Tools over HTTP with the official client, on an engine that writes what models write."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from aserve.config.server import ServerArgs
from aserve.errors import ConfigError
from tests.server.conftest import events, make_app, running, until
from tests.server.tools.engine import HERMES, TellingEngine

URL = "/v1/chat/completions"
ASK: Any = [{"role": "user", "content": "Weather in Paris?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
TWO = f'Let me see.\n{CALL}\n<tool_call>\n{{"name": "clock", "arguments": {{}}}}\n</tool_call>'


@asynccontextmanager
async def client_of(engine: TellingEngine, **values: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        running(make_app(engine, **values)) as port,
        openai.AsyncOpenAI(api_key="x", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client,
    ):
        yield client


def chat(client: openai.AsyncOpenAI, **values: Any) -> Any:
    return client.chat.completions.create(**({"model": "fake", "messages": ASK, "max_tokens": 500} | values))


async def streamed(client: openai.AsyncOpenAI, **values: Any) -> Any:
    """What the client's own accumulator makes of a stream, and its chunks."""
    settings = {"model": "fake", "messages": ASK, "max_tokens": 500, **values}
    async with client.chat.completions.stream(**settings) as stream:
        chunks = [event.chunk async for event in stream if event.type == "chunk"]
        return await stream.get_final_completion(), chunks


async def post(engine: TellingEngine, values: dict[str, Any], **args: Any) -> tuple[int, Any]:
    engine.failed = None  # an app that ends stops its engine
    app = make_app(engine, **args)
    async with app.test_app():
        body = {"model": "fake", "messages": ASK, "max_tokens": 500, **values}
        answer = await app.test_client().post(URL, json=body)
        return answer.status_code, await answer.get_json()


# ---------------------------------------------------------------- answers


async def test_the_wire_format() -> None:
    engine = TellingEngine(CALL)
    status, answer = await post(engine, {"tools": [WEATHER]})
    assert status == 200
    (choice,) = answer["choices"]
    call_id = choice["message"]["tool_calls"][0].pop("id")
    assert call_id.startswith("call_") and len(call_id) == 29
    function = {"name": "get_weather", "arguments": '{"city":"Paris","days":2}'}
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": function}],
        },
        "logprobs": None,
        "finish_reason": "tool_calls",
        "stop_reason": None,
    }
    assert engine.submitted[0].params.guided is None


async def test_the_wire_format_of_a_stream() -> None:
    app = make_app(TellingEngine(TWO, step=7))
    async with app.test_app():
        body = {
            "model": "fake",
            "messages": ASK,
            "max_tokens": 500,
            "stream": True,
            "tools": [WEATHER, CLOCK],
        }
        answer = await app.test_client().post(URL, json=body)
        *chunks, done = events(await answer.get_data())
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": None}
    assert deltas[-1] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    assert "".join(delta["content"] for delta in deltas[1:] if "content" in delta) == "Let me see."
    calls = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert all(len(call) == 1 for call in calls)
    starts = [call[0] for call in calls if "id" in call[0]]
    assert [list(start) for start in starts] == [["index", "id", "type", "function"]] * 2
    assert [(start["index"], start["function"]) for start in starts] == [
        (0, {"name": "get_weather", "arguments": ""}),
        (1, {"name": "clock", "arguments": ""}),
    ]
    later = [call[0] for call in calls if "id" not in call[0]]
    assert all(
        list(call) == ["index", "function"] and list(call["function"]) == ["arguments"] for call in later
    )
    assert len([call for call in later if call["index"] == 0]) > 2  # piece by piece
    assert "tool_calls" not in json.dumps([delta for delta in deltas if delta.get("tool_calls") == []])


@pytest.mark.parametrize("step", [1, 3, 10_000])
async def test_streamed_is_whole(step: int) -> None:
    engine = TellingEngine(TWO, "No need.", step=step)
    async with client_of(engine) as client:
        settings = {"tools": [WEATHER, CLOCK], "n": 2}
        whole = await chat(client, **settings)
        pieced, _ = await streamed(client, **settings)
    for answer in (whole, pieced):
        calling, plain = answer.choices
        assert calling.message.content == "Let me see."
        functions = [(call.function.name, call.function.arguments) for call in calling.message.tool_calls]
        assert functions == [("get_weather", '{"city":"Paris","days":2}'), ("clock", "{}")]
        assert calling.finish_reason == "tool_calls"
        assert plain.message.content == "No need."
        assert not plain.message.tool_calls
        assert plain.finish_reason == "stop"
        assert len({call.id for call in calling.message.tool_calls}) == 2


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", CALL),
        ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}'),
        ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]'),
        ("pythonic", '[get_weather(city="Paris", days=2)]'),
    ],
)
async def test_a_parser_by_name(parser: str, text: str) -> None:
    async with client_of(TellingEngine(text), tool_call_parser=parser.replace("_", "-")) as client:
        answer, _ = await streamed(client, tools=[WEATHER])
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Paris", "days": 2}
        whole = await chat(client, tools=[WEATHER])
        assert whole.choices[0].message.tool_calls[0].function == type(
            whole.choices[0].message.tool_calls[0].function
        )(name=call.function.name, arguments=call.function.arguments)


async def test_r23_a_call_cut_by_max_tokens() -> None:
    async with client_of(TellingEngine(CALL)) as client:
        for limit in range(1, len(CALL), 7):
            stream = await chat(client, tools=[WEATHER], max_tokens=limit, stream=True)
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].choices[0].finish_reason == "length"
            whole = await chat(client, tools=[WEATHER], max_tokens=limit)
            assert whole.choices[0].finish_reason == "length"


async def test_logprobs_and_usage_lose_no_token() -> None:
    async with client_of(TellingEngine(TWO, step=2)) as client:
        settings = {"tools": [WEATHER, CLOCK], "logprobs": True}
        whole = await chat(client, **settings)
        _, chunks = await streamed(client, **settings, stream_options={"include_usage": True})
    told = [
        entry.token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content
    ]
    assert told == [entry.token for entry in whole.choices[0].logprobs.content]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == len(told)


async def test_one_call_if_not_parallel() -> None:
    async with client_of(TellingEngine(TWO)) as client:
        settings = {"tools": [WEATHER, CLOCK], "parallel_tool_calls": False}
        whole = await chat(client, **settings)
        pieced, _ = await streamed(client, **settings)
    for answer in (whole, pieced):
        assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather"]


async def test_the_clients_parsing_helper() -> None:
    class GetWeather(BaseModel):
        city: str
        days: int

    text = CALL.replace("get_weather", "GetWeather")
    async with client_of(TellingEngine(text)) as client:
        answer = await client.chat.completions.parse(
            model="fake", messages=ASK, max_tokens=500, tools=[openai.pydantic_function_tool(GetWeather)]
        )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == GetWeather(city="Paris", days=2)


# ---------------------------------------------------------------- required, named, none


@pytest.mark.parametrize("stream", [False, True])
async def test_required(stream: bool) -> None:
    engine = TellingEngine(
        '[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "clock", "arguments": {}}]'
    )
    async with client_of(engine) as client:
        settings = {"tools": [WEATHER, CLOCK], "tool_choice": "required"}
        answer = (await streamed(client, **settings))[0] if stream else await chat(client, **settings)
    calls = answer.choices[0].message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("get_weather", '{"city":"Paris"}'),
        ("clock", "{}"),
    ]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    schema = json.loads(engine.submitted[0].params.guided.text)
    names = [each["properties"]["name"]["enum"] for each in schema["items"]["anyOf"]]
    assert (schema["type"], schema["minItems"], names) == ("array", 1, [["get_weather"], ["clock"]])
    assert "maxItems" not in schema


@pytest.mark.parametrize("stream", [False, True])
async def test_named(stream: bool) -> None:
    engine = TellingEngine('{"city": "Paris"}')
    async with client_of(engine) as client:
        settings = {"tools": [CLOCK, WEATHER], "tool_choice": NAMED}
        answer = (await streamed(client, **settings))[0] if stream else await chat(client, **settings)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city":"Paris"}')
    assert answer.choices[0].finish_reason == "tool_calls"
    schema = json.loads(engine.submitted[0].params.guided.text)
    assert schema == WEATHER["function"]["parameters"] | {"additionalProperties": False}


async def test_a_backend_for_a_forced_call() -> None:
    engine = TellingEngine("[]")
    settings = {"tools": [CLOCK], "tool_choice": "required", "guided_decoding_backend": "outlines"}
    assert (await post(engine, settings))[0] == 200
    assert engine.submitted[0].params.guided.backend == "outlines"


@pytest.mark.parametrize("choice", ["auto", "required", NAMED])
async def test_tools_and_another_guide_are_refused(choice: Any) -> None:
    engine = TellingEngine("x")
    guide = {"response_format": {"type": "json_object"}}
    status, error = await post(engine, {"tools": [WEATHER], "tool_choice": choice, **guide})
    assert status == 400
    assert "response_format" in error["message"]
    status, _ = await post(engine, {"tools": [WEATHER], "tool_choice": "none", **guide})
    assert status == 200


async def test_allowed_tools() -> None:
    engine = TellingEngine('[{"name": "clock", "arguments": {}}]')
    allowed = {"mode": "required", "tools": [CLOCK]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    status, answer = await post(engine, {"tools": [WEATHER, CLOCK], "tool_choice": choice})
    assert status == 200
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "clock"
    assert [tool["function"]["name"] for tool in engine.tokenizer.tools] == ["clock"]


async def test_none_hides_the_tools() -> None:
    engine = TellingEngine(CALL)
    status, answer = await post(engine, {"tools": [WEATHER], "tool_choice": "none"})
    assert status == 200
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": CALL}
    assert engine.tokenizer.tools is None


# ---------------------------------------------------------------- what the model is shown


RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}


def called(arguments: Any, content: str | None = None) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    call = {"id": "call_1", "type": "function", "function": function, "index": 0}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


async def test_tools_and_calls_reach_the_template() -> None:
    engine = TellingEngine("Sunny.")
    messages = [*ASK, called('{"city": "Paris"}'), RESULT]
    status, _ = await post(engine, {"messages": messages, "tools": [WEATHER, CLOCK]})
    assert status == 200
    without = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
    assert engine.tokenizer.tools == [WEATHER, {"type": "function", "function": without}]
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert engine.tokenizer.conversation == [
        ASK[0],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        RESULT,
    ]
    # Calls stay in the conversation of a request without tools.
    status, _ = await post(engine, {"messages": messages})
    assert status == 200
    assert engine.tokenizer.conversation[1]["tool_calls"][0]["function"] == function
    assert engine.tokenizer.tools is None


DEEP = '{"a":' * 300 + "1" + "}" * 300


@pytest.mark.parametrize(
    ("given", "shown"),
    [("", {}), ("{broken", "{broken"), ("[1]", "[1]"), ({"a": 1}, {"a": 1}), (None, {}), (DEEP, DEEP)],
)
async def test_arguments_of_earlier_calls(given: Any, shown: Any) -> None:
    engine = TellingEngine("ok")
    assert (await post(engine, {"messages": [*ASK, called(given), RESULT]}))[0] == 200
    assert engine.tokenizer.conversation[1]["tool_calls"][0]["function"]["arguments"] == shown


async def test_a_template_that_insists_on_short_ids() -> None:
    template = "[TOOL_CALLS] tools tool_calls: alphanumeric strings with length 9!"
    engine = TellingEngine('[TOOL_CALLS] [{"name": "clock"}]', template=template)
    messages = [*ASK, called("{}"), RESULT]
    status, answer = await post(engine, {"messages": messages, "tools": [CLOCK]})
    assert status == 200
    made = answer["choices"][0]["message"]["tool_calls"][0]["id"]
    assert len(made) == 9 and made.isalnum()
    _, calling, result = engine.tokenizer.conversation
    assert calling["tool_calls"][0]["id"] == result["tool_call_id"]
    assert len(result["tool_call_id"]) == 9
    messages[2] = {**RESULT, "tool_call_id": made}
    await post(engine, {"messages": messages, "tools": [CLOCK]})
    assert engine.tokenizer.conversation[2]["tool_call_id"] == made


async def test_a_template_that_knows_no_tools_is_helped() -> None:
    engine = TellingEngine('{"city": "Paris"}', template="{{ messages }}")
    messages = [{"role": "system", "content": "Be brief."}, *ASK, called('{"city": "Rome"}', "So:"), RESULT]
    status, _ = await post(engine, {"messages": messages, "tools": [WEATHER], "tool_choice": NAMED})
    assert status == 200
    assert engine.tokenizer.tools is None
    system, _, calling, result = engine.tokenizer.conversation
    assert system["content"].startswith("Be brief.\n\nThese functions can be called:\n")
    assert '"name":"get_weather","description":"Tells the weather."' in system["content"]
    assert calling == {
        "role": "assistant",
        "content": 'So:\n[{"name":"get_weather","arguments":{"city":"Rome"}}]',
    }
    assert result == RESULT
    status, _ = await post(engine, {"tools": [WEATHER], "tool_choice": "required"})
    assert engine.tokenizer.conversation[0]["role"] == "system"
    assert '[{"name": "<name>"' in engine.tokenizer.conversation[0]["content"]


async def test_a_template_that_knows_no_tools_and_auto() -> None:
    """What the model is told to write, and shown to have written, is what is read."""
    engine = TellingEngine(CALL, template="{{ messages }}")
    messages = [*ASK, called('{"city": "Rome"}', "So:"), RESULT]
    status, answer = await post(engine, {"messages": messages, "tools": [WEATHER]})
    assert status == 200
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    system, _, calling, _ = engine.tokenizer.conversation
    assert '<tool_call>{"name": "<name>"' in system["content"]
    written = 'So:\n<tool_call>{"name":"get_weather","arguments":{"city":"Rome"}}</tool_call>'
    assert calling["content"] == written
    engine = TellingEngine("[clock()]", template="{{ messages }}")
    status, answer = await post(engine, {"tools": [CLOCK]}, tool_call_parser="pythonic")
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "clock"


async def test_marks_that_are_special_tokens_are_kept() -> None:
    engine = TellingEngine(CALL)
    await post(engine, {"tools": [WEATHER]})
    engine.tokenizer.all_special_tokens = ("<tool_call>",)
    await post(engine, {"tools": [WEATHER]})
    await post(engine, {})
    assert [each.params.skip_special_tokens for each in engine.submitted] == [True, False, True]


# ---------------------------------------------------------------- settings


async def test_auto_without_a_parser_is_refused() -> None:
    engine = TellingEngine("x", template="{{ tools }}")
    for extra in ({}, {"tool_choice": "auto"}):
        status, error = await post(engine, {"tools": [WEATHER], **extra})
        assert status == 400
        assert "--tool-call-parser" in error["message"]
        assert error["param"] == "tools"
    assert not engine.submitted
    assert (await post(engine, {"tools": [WEATHER]}, tool_call_parser="hermes"))[0] == 200


@pytest.mark.parametrize("template", ["{{ messages }}", "{{ tools }}", HERMES])
async def test_enable_auto_tool_choice_is_checked_at_start(
    template: str, caplog: pytest.LogCaptureFixture
) -> None:
    fatal = []
    engine = TellingEngine("x", template=template)
    app = make_app(engine, enable_auto_tool_choice=True, on_fatal=lambda: fatal.append(True))
    with caplog.at_level("INFO", "aserve"):
        async with app.test_app():
            await until(lambda: app.extensions["aserve"]._settled.is_set())
    if template != "{{ tools }}":
        assert not fatal
        assert "with the parser hermes" in caplog.text
    else:
        assert fatal
        assert "--tool-call-parser" in caplog.text


def test_an_unknown_parser_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hermes, llama3-json, mistral, pythonic, got 'xml'"):
        ServerArgs(tool_call_parser="xml").check()


def function(**values: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **values}}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


BEAM = {"use_beam_search": True, "best_of": 2, "temperature": 0}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [5]}, "tools", "tools.0 must be an object"),
    ({"tools": [{"function": {"name": "f"}}]}, "tools", "tools.0.type"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", 'must be "function"'),
    ({"tools": [{"type": "function"}]}, "tools", "tools.0.function"),
    ({"tools": [function(name="")]}, "tools", "tools.0.function.name"),
    ({"tools": [function(name="a b")]}, "tools", "tools.0.function.name"),
    ({"tools": [function(name="x" * 129)]}, "tools", "tools.0.function.name"),
    ({"tools": [function(name=5)]}, "tools", "tools.0.function.name"),
    ({"tools": [function(), function()]}, "tools", "'f' twice"),
    ({"tools": [function(description=5)]}, "tools", "description"),
    ({"tools": [function(strict="yes")]}, "tools", "strict"),
    ({"tools": [function(parameters=[])]}, "tools", "parameters"),
    ({"tools": [function(parameters={"type": "array"})]}, "tools", "parameters.type"),
    ({"tools": [function(parameters=deep(25))]}, "tools", "nested deeper than 48"),
    ({"tools": [function(parameters={"x": "y" * 140_000})]}, "tools", "larger than"),
    ({"tools": [function(name=f"f{i}") for i in range(513)]}, "tools", "at most 512"),
    ({"tools": "f"}, "tools", "list"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tool_choice": NAMED}, "tool_choice", "needs tools"),
    ({"tools": [function()], "tool_choice": NAMED}, "tool_choice", "'get_weather', which is not in tools"),
    ({"tools": [function()], "tool_choice": "sometimes"}, "tool_choice", "must be"),
    ({"tools": [function()], "tool_choice": 5}, "tool_choice", "must be"),
    ({"tools": [function()], "tool_choice": {"type": "function"}}, "tool_choice", "name"),
    ({"tools": [function()], "tool_choice": {"type": "function", "function": {}}}, "tool_choice", "name"),
    ({"tools": [function()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools"),
    ({"tools": [function()], "parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
    ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages", "messages.0.tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages", "messages.0.tool_calls.0"),
    # No call is no call, whoever's, and also where Python takes it for false.
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [5]}]}, "messages", "tool_calls.0"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": {}}]}, "messages", "tool_calls"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}]},
        "messages",
        "messages.0.tool_calls.0.function.name",
    ),
    ({"messages": [called(deep(300))]}, "messages", "nested deeper than 48"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 5}]}, "messages", "tool_call_id"),
    (
        {"tools": [function()], "tool_choice": "required", **BEAM},
        "tool_choice",
        "beam search",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "param", "says"), REFUSED, ids=lambda value: str(value)[:50])
async def test_refused(values: dict[str, Any], param: str, says: str) -> None:
    engine = TellingEngine("x")
    status, error = await post(engine, values)
    assert status == 400, error
    assert says in error["message"]
    assert error["param"] == param
    assert len(error["message"]) < 400
    assert not engine.submitted
