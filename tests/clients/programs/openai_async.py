"""The asynchronous client of the openai package."""

from __future__ import annotations

import asyncio
from typing import Literal

import openai
from kit import BASE, CAPITAL, KEY, MODEL, NAMED, USER, WEATHER, check, main, weather_arguments
from pydantic import BaseModel, Field


class Visit(BaseModel):
    city: Literal["Paris", "Oslo"]
    days: int = Field(ge=1, le=9)


def client() -> openai.AsyncOpenAI:
    # A slash at the end of the address is common.
    return openai.AsyncOpenAI(base_url=BASE + "/", api_key=KEY, max_retries=0, timeout=120)


@check("32 chats at once")
async def many() -> None:
    async with client() as api:
        answers = await asyncio.gather(
            *(
                api.chat.completions.create(model=MODEL, messages=USER, temperature=0, max_tokens=12)
                for _ in range(32)
            )
        )
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert len({answer.id for answer in answers}) == 32


@check("streamed chat, n=2, with usage in every chunk")
async def streamed() -> None:
    async with client() as api:
        stream = await api.chat.completions.create(
            model=MODEL,
            messages=USER,
            max_tokens=12,
            n=2,
            seed=7,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={
                "top_k": 20,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            },
        )
        texts, ends, usage = {0: "", 1: ""}, set(), None
        async for chunk in stream:
            assert chunk.usage is not None
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    ends.add(choice.index)
    assert all(texts.values())
    assert ends == {0, 1}
    assert usage.completion_tokens > 2


@check("a stream that is left early")
async def left() -> None:
    async with client() as api:
        for _ in range(4):
            stream = await api.chat.completions.create(
                model=MODEL, messages=USER, max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
            )
            async for _chunk in stream:
                break
            await stream.close()
        answer = await api.chat.completions.create(model=MODEL, messages=USER, temperature=0, max_tokens=12)
    assert "Paris" in answer.choices[0].message.content


@check("parse, whole and streamed")
async def parse() -> None:
    asked = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 60, "response_format": Visit}
    async with client() as api:
        whole = await api.chat.completions.parse(**asked)
        async with api.chat.completions.stream(**asked) as stream:
            streamed = await stream.get_final_completion()
    assert isinstance(whole.choices[0].message.parsed, Visit)
    assert streamed.choices[0].message.parsed == whole.choices[0].message.parsed


@check("tools, streamed")
async def tools() -> None:
    async with client() as api:
        stream = await api.chat.completions.create(
            model=MODEL,
            messages=USER,
            temperature=0,
            max_tokens=60,
            tools=[WEATHER],
            tool_choice=NAMED,
            stream=True,
        )
        names, arguments = [], ""
        async for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or ():
                names += [call.function.name] if call.function.name else []
                arguments += call.function.arguments or ""
    assert names == ["weather"]
    weather_arguments(arguments)


@check("responses, streamed")
async def responses() -> None:
    async with client() as api:
        text, last = "", None
        async for event in await api.responses.create(
            model=MODEL, input=CAPITAL, temperature=0, max_output_tokens=12, stream=True
        ):
            last = event
            if event.type == "response.output_text.delta":
                text += event.delta
    assert "Paris" in text
    assert last.response.output_text == text


main("openai")
