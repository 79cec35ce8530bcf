"""The synchronous client of the openai package."""

from __future__ import annotations

import math
from typing import Literal

import openai
from kit import BASE, CAPITAL, KEY, MODEL, NAMED, USER, WEATHER, check, main, weather_arguments
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=BASE, api_key=KEY, max_retries=0, timeout=120)


class Visit(BaseModel):
    city: Literal["Paris", "Oslo"]
    days: int = Field(ge=1, le=9)


@check("models")
def models() -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


@check("chat with logprobs")
def chat() -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=USER,
        temperature=0,
        max_completion_tokens=12,
        logprobs=True,
        top_logprobs=2,
        seed=1,
        stop=None,
        user="someone",
        metadata={"a": "b"},
        store=False,
    )
    choice = answer.choices[0]
    assert "Paris" in choice.message.content
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    assert "".join(entry.token for entry in choice.logprobs.content).startswith(choice.message.content)
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    assert choice.message.tool_calls is None


@check("streamed chat with usage")
def streamed() -> None:
    asked = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


@check("the stream helper's events")
def events() -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=USER, temperature=0, max_tokens=64, stream_options={"include_usage": True}
    ) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(kinds), set(kinds)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.completion_tokens > 1


@check("chat.completions.parse")
def parse() -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=USER, temperature=0, max_tokens=60, response_format=Visit
    )
    visit = answer.choices[0].message.parsed
    assert isinstance(visit, Visit), answer


@check("beta.chat.completions.parse")
def beta_parse() -> None:
    answer = client.beta.chat.completions.parse(
        model=MODEL, messages=USER, temperature=0, max_tokens=60, response_format=Visit
    )
    assert isinstance(answer.choices[0].message.parsed, Visit), answer


@check("streamed parse")
def streamed_parse() -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=USER, temperature=0, max_tokens=60, response_format=Visit
    ) as stream:
        answer = stream.get_final_completion()
    assert isinstance(answer.choices[0].message.parsed, Visit), answer


@check("tools: a named function, and its result sent back")
def named_tool() -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, temperature=0, max_tokens=60, tools=[WEATHER], tool_choice=NAMED
    )
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather"
    weather_arguments(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees."}
    # The message goes back as the client's own object, nulls and all.
    after = client.chat.completions.create(
        model=MODEL, messages=[*USER, message, result], temperature=0, max_tokens=20, tools=[WEATHER]
    )
    assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")


@check("tools: required, streamed")
def streamed_tools() -> None:
    asked = {
        "model": MODEL,
        "messages": USER,
        "temperature": 0,
        "max_tokens": 80,
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds, kinds
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
    (call,) = streamed.message.tool_calls
    assert call.function.arguments == whole.message.tool_calls[0].function.arguments
    weather_arguments(call.function.arguments)


@check("tools: auto and parsed strict functions")
def parsed_tools() -> None:
    class weather(BaseModel):
        city: Literal["Paris", "Oslo", "Lima"]

    answer = client.chat.completions.parse(
        model=MODEL,
        messages=USER,
        temperature=0,
        max_tokens=60,
        tools=[openai.pydantic_function_tool(weather)],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, weather), answer
    free = client.chat.completions.create(
        model=MODEL, messages=USER, temperature=0, max_tokens=24, tools=[WEATHER], tool_choice="auto"
    )
    assert free.choices[0].message.content or free.choices[0].message.tool_calls


@check("completions: batch, echo, logprobs, n, streamed")
def completions() -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["One, two,", "The sky is"], max_tokens=4, temperature=0, echo=True, logprobs=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[1].text.startswith("The sky is")
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    pieces = client.completions.create(
        model=MODEL, prompt="One, two,", max_tokens=4, temperature=0.9, n=2, seed=3, stream=True
    )
    texts = {0: "", 1: ""}
    for piece in pieces:
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert all(texts.values()), texts


@check("embeddings as floats and as base64")
def embeddings() -> None:
    asked = {"model": MODEL, "input": ["a cat", "a dog"]}
    # The client asks for base64 by itself unless it is told otherwise.
    packed = client.embeddings.create(**asked).data
    plain = client.embeddings.create(**asked, encoding_format="float").data
    for one, other in zip(packed, plain, strict=True):
        assert math.isclose(math.hypot(*one.embedding), 1, rel_tol=1e-4)
        assert max(abs(a - b) for a, b in zip(one.embedding, other.embedding, strict=True)) < 1e-6


@check("responses: whole, streamed, parsed, with a function")
def responses() -> None:
    asked = {"model": MODEL, "input": CAPITAL, "temperature": 0, "max_output_tokens": 16}
    whole = client.responses.create(**asked)
    assert "Paris" in whole.output_text
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert streamed.output_text == whole.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete"), kinds
    parsed = client.responses.parse(
        model=MODEL, input=CAPITAL, temperature=0, max_output_tokens=60, text_format=Visit
    )
    assert isinstance(parsed.output_parsed, Visit), parsed
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    asked |= {"max_output_tokens": 80, "tools": [tool], "tool_choice": "required"}
    called = client.responses.create(**asked, parallel_tool_calls=False)
    (call,) = (item for item in called.output if item.type == "function_call")
    weather_arguments(call.arguments)


@check("errors as the client's exceptions")
def errors() -> None:
    for asked, kind in (
        ({"model": "nobody", "messages": USER}, openai.NotFoundError),
        ({"model": MODEL, "messages": []}, openai.BadRequestError),
        ({"model": MODEL, "messages": USER, "top_p": 3}, openai.BadRequestError),
        ({"model": MODEL, "messages": USER, "max_tokens": 10**6}, openai.BadRequestError),
    ):
        try:
            client.chat.completions.create(**asked)
        except kind as error:
            assert error.body["message"], error.body
        else:
            raise AssertionError(f"{asked} was answered")


main("openai")
