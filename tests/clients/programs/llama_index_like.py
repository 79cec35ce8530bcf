"""LlamaIndex: OpenAILike."""

from typing import Literal

from kit import BASE, CAPITAL, KEY, MODEL, check, main
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

ASK = [ChatMessage(role="user", content=CAPITAL)]


class Visit(BaseModel):
    """A visit to a city."""

    city: Literal["Paris", "Oslo"]
    days: int = Field(ge=1, le=9)


def weather(city: Literal["Paris", "Oslo", "Lima"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def model(**values: object) -> OpenAILike:
    settings = {
        "is_chat_model": True,
        "is_function_calling_model": True,
        "temperature": 0.0,
        "max_tokens": 60,
        "max_retries": 0,
        "timeout": 120.0,
        "context_window": 8192,
        **values,
    }
    return OpenAILike(model=MODEL, api_base=BASE, api_key=KEY, **settings)


@check("chat and complete")
def chat() -> None:
    answer = model().chat(ASK)
    assert "Paris" in answer.message.content
    assert model().complete(CAPITAL).text == answer.message.content


@check("stream_chat and stream_complete")
def stream() -> None:
    whole = model().chat(ASK).message.content
    pieces = list(model().stream_chat(ASK))
    assert pieces[-1].message.content == whole
    assert "".join(piece.delta or "" for piece in pieces) == whole
    assert [*model().stream_complete(CAPITAL)][-1].text == whole


@check("achat, acomplete, astream_chat")
async def asynchronous() -> None:
    whole = (await model().achat(ASK)).message.content
    assert (await model().acomplete(CAPITAL)).text == whole
    pieces = [piece async for piece in await model().astream_chat(ASK)]
    assert pieces[-1].message.content == whole


@check("is_chat_model=False: completions, whole and streamed")
def completions() -> None:
    plain = model(is_chat_model=False, max_tokens=6)
    text = plain.complete("One, two,").text
    assert text
    assert [*plain.stream_complete("One, two,")][-1].text == text


@check("tools: required, auto, streamed")
def tools() -> None:
    tool = FunctionTool.from_defaults(weather)
    api = model(max_tokens=80)
    answer = api.chat_with_tools([tool], user_msg=CAPITAL, tool_required=True)
    (call, *_) = api.get_tool_calls_from_response(answer)
    assert call.tool_name == "weather"
    assert call.tool_kwargs["city"] in ("Paris", "Oslo", "Lima")
    *_, last = api.stream_chat_with_tools([tool], user_msg=CAPITAL, tool_required=True)
    assert api.get_tool_calls_from_response(last)[0].tool_kwargs == call.tool_kwargs
    free = model(max_tokens=12).chat_with_tools([tool], user_msg=CAPITAL)
    assert free.message.content or free.message.additional_kwargs


@check("structured output: structured_predict and as_structured_llm, with and without function calling")
def structured() -> None:
    prompt = PromptTemplate("{question}")
    for values in (
        {},
        {"should_use_structured_outputs": True},
    ):
        api = model(**values)
        found = api.structured_predict(Visit, prompt, question=CAPITAL)
        assert isinstance(found, Visit), (values, found)
        found = api.as_structured_llm(Visit).complete(CAPITAL).raw
        assert isinstance(found, Visit), (values, found)


main("llama-index-llms-openai-like", "llama-index-core", "openai")
