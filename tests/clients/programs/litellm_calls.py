"""LiteLLM, by its providers hosted_vllm and openai."""

from __future__ import annotations

import os
from typing import Literal

# Its table of prices comes from the network otherwise.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from kit import BASE, KEY, MODEL, NAMED, USER, WEATHER, check, main, weather_arguments
from pydantic import BaseModel, Field

HOSTED = {"model": f"hosted_vllm/{MODEL}", "api_base": BASE, "max_retries": 0, "timeout": 120}
OPENAI = {**HOSTED, "model": f"openai/{MODEL}", "api_key": KEY}
BOTH = (HOSTED, OPENAI)


class Visit(BaseModel):
    city: Literal["Paris", "Oslo"]
    days: int = Field(ge=1, le=9)


@check("completion, both providers")
def whole() -> None:
    for api in BOTH:
        answer = litellm.completion(**api, messages=USER, temperature=0, max_tokens=40)
        assert "Paris" in answer.choices[0].message.content
        assert answer.usage.completion_tokens > 1


@check("streamed completion with usage, put together")
def streamed() -> None:
    for api in BOTH:
        chunks = list(
            litellm.completion(
                **api,
                messages=USER,
                temperature=0,
                max_tokens=40,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        built = litellm.stream_chunk_builder(chunks, messages=USER)
        assert "Paris" in built.choices[0].message.content
        assert built.usage.completion_tokens > 1


@check("acompletion, whole and streamed")
async def asynchronous() -> None:
    answer = await litellm.acompletion(**HOSTED, messages=USER, temperature=0, max_tokens=40)
    stream = await litellm.acompletion(**HOSTED, messages=USER, temperature=0, max_tokens=40, stream=True)
    text = ""
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    assert text == answer.choices[0].message.content


@check("tools: named, required, auto, a result sent back, streamed")
def tools() -> None:
    for api in BOTH:
        asked = {**api, "messages": USER, "temperature": 0, "max_tokens": 80, "tools": [WEATHER]}
        message = litellm.completion(**asked, tool_choice=NAMED).choices[0].message
        weather_arguments(message.tool_calls[0].function.arguments)
        required = litellm.completion(**asked, tool_choice="required").choices[0]
        weather_arguments(required.message.tool_calls[0].function.arguments)
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny."}
        after = litellm.completion(**{**asked, "messages": [*USER, message, result], "max_tokens": 12})
        assert after.choices[0].message.content or after.choices[0].message.tool_calls
        chunks = list(litellm.completion(**asked, tool_choice=NAMED, stream=True))
        built = litellm.stream_chunk_builder(chunks, messages=USER).choices[0].message
        assert built.tool_calls[0].function.arguments == message.tool_calls[0].function.arguments


@check("response_format: a pydantic model")
def structured() -> None:
    for api in BOTH:
        answer = litellm.completion(**api, messages=USER, temperature=0, max_tokens=60, response_format=Visit)
        Visit.model_validate_json(answer.choices[0].message.content)


@check("thinking blocks of another provider in the conversation")
def thoughts() -> None:
    earlier = {
        "role": "assistant",
        "content": "Paris.",
        "reasoning_content": "France is in Europe.",
        "thinking_blocks": [{"type": "thinking", "thinking": "France is in Europe.", "signature": "x"}],
    }
    for api in BOTH:
        answer = litellm.completion(
            **api, messages=[*USER, earlier, *USER], temperature=0, max_tokens=12, reasoning_effort="low"
        )
        assert answer.choices[0].message.content


@check("text_completion")
def text_completion() -> None:
    for api in BOTH:
        answer = litellm.text_completion(**api, prompt="One, two,", temperature=0, max_tokens=6)
        assert answer.choices[0].text


@check("embedding")
def embedding() -> None:
    for api in BOTH:
        found = litellm.embedding(**api, input=["a cat", "a dog"])
        assert len(found.data) == 2
        assert len(found.data[0]["embedding"]) > 100


@check("responses and anthropic messages")
async def others() -> None:
    answer = litellm.responses(**OPENAI, input=USER[0]["content"], temperature=0, max_output_tokens=40)
    assert "Paris" in answer.output[0].content[0].text
    answer = await litellm.anthropic.messages.acreate(**HOSTED, messages=USER, max_tokens=40, temperature=0)
    assert "Paris" in answer["content"][0]["text"]


@check("errors as the client's exceptions")
def errors() -> None:
    for wrong, kind in (
        ({"model": "hosted_vllm/nobody"}, litellm.NotFoundError),
        ({"top_p": 3}, litellm.BadRequestError),
    ):
        try:
            litellm.completion(**{**HOSTED, "messages": USER, **wrong})
        except kind:
            pass
        else:
            raise AssertionError(f"{wrong} was answered")


main("litellm", "openai")
