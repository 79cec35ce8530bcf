"""The anthropic package on /v1/messages."""

from __future__ import annotations

import anthropic
from kit import KEY, MODEL, SERVER, USER, WEATHER, check, main

client = anthropic.Anthropic(base_url=SERVER, api_key=KEY, max_retries=0, timeout=120)
GREEDY = {"temperature": 0}
"""Newer versions have no such argument."""
TOOL = {
    "name": "weather",
    "description": WEATHER["function"]["description"],
    "input_schema": WEATHER["function"]["parameters"],
    "cache_control": {"type": "ephemeral"},
}


@check("messages, with a system text")
def whole() -> None:
    answer = client.messages.create(
        model=MODEL,
        max_tokens=12,
        extra_body=GREEDY,
        system=[{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}],
        messages=USER,
        metadata={"user_id": "someone"},
    )
    assert "Paris" in answer.content[0].text
    assert answer.usage.output_tokens > 1
    assert answer.stop_reason in ("end_turn", "max_tokens")


@check("streamed messages and their events")
def streamed() -> None:
    asked = {"model": MODEL, "max_tokens": 12, "extra_body": GREEDY, "messages": USER}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert answer.content[0].text == whole.content[0].text
    assert answer.usage.output_tokens == whole.usage.output_tokens


@check("tools, whole and streamed, and a result sent back")
def tools() -> None:
    asked = {
        "model": MODEL,
        "max_tokens": 80,
        "extra_body": GREEDY,
        "tools": [TOOL],
        "tool_choice": {"type": "tool", "name": "weather"},
    }
    answer = client.messages.create(**asked, messages=USER)
    (use,) = (block for block in answer.content if block.type == "tool_use")
    assert answer.stop_reason == "tool_use"
    assert use.input["city"] in ("Paris", "Oslo", "Lima")
    with client.messages.stream(**asked, messages=USER) as stream:
        streamed = stream.get_final_message()
    (again,) = (block for block in streamed.content if block.type == "tool_use")
    assert again.input == use.input
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "Sunny."}
    after = client.messages.create(
        model=MODEL,
        max_tokens=12,
        tools=[TOOL],
        messages=[
            *USER,
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": [result]},
        ],
    )
    assert after.role == "assistant"


@check("count_tokens")
def count() -> None:
    short = client.messages.count_tokens(model=MODEL, messages=USER).input_tokens
    long = client.messages.count_tokens(model=MODEL, messages=USER, system="x " * 50).input_tokens
    usage = client.messages.create(model=MODEL, max_tokens=1, messages=USER).usage
    # What was found in the cache is counted apart.
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == short < long


@check("the beta client, as Claude Code calls it")
def beta() -> None:
    answer = client.beta.messages.create(
        model=MODEL,
        max_tokens=12,
        extra_body=GREEDY,
        messages=USER,
        betas=["interleaved-thinking-2025-05-14"],
    )
    assert "Paris" in answer.content[0].text


@check("the asynchronous client")
async def asynchronous() -> None:
    async with anthropic.AsyncAnthropic(base_url=SERVER, api_key=KEY, max_retries=0, timeout=120) as api:
        text = ""
        async with api.messages.stream(
            model=MODEL, max_tokens=12, extra_body=GREEDY, messages=USER
        ) as stream:
            async for piece in stream.text_stream:
                text += piece
    assert "Paris" in text


@check("errors as the client's exceptions")
def errors() -> None:
    for asked, kind in (
        ({"model": "nobody", "max_tokens": 4, "messages": USER}, anthropic.NotFoundError),
        ({"model": MODEL, "max_tokens": 0, "messages": USER}, anthropic.BadRequestError),
    ):
        try:
            client.messages.create(**asked)
        except kind as error:
            assert error.body["error"]["message"], error.body
        else:
            raise AssertionError(f"{asked} was answered")


main("anthropic")
