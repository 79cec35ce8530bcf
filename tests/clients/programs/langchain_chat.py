"""LangChain: ChatOpenAI, the older OpenAI for completions, and OpenAIEmbeddings."""

from __future__ import annotations

from typing import Literal

from kit import BASE, CAPITAL, KEY, MODEL, check, main
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


class Visit(BaseModel):
    """A visit to a city."""

    city: Literal["Paris", "Oslo"]
    days: int = Field(ge=1, le=9)


@tool
def weather(city: Literal["Paris", "Oslo", "Lima"], days: Literal[1, 2, 3]) -> str:
    """The weather of a city."""
    return f"{days} sunny days in {city}"


def chat(**values: object) -> ChatOpenAI:
    settings = {"temperature": 0, "max_tokens": 60, "max_retries": 0, "timeout": 120, **values}
    return ChatOpenAI(model=MODEL, base_url=BASE, api_key=KEY, **settings)


@check("invoke")
def invoke() -> None:
    answer = chat(logprobs=True, top_logprobs=1).invoke([SystemMessage("Be short."), HumanMessage(CAPITAL)])
    assert answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["logprobs"]["content"]


@check("stream, with usage")
def stream() -> None:
    whole = chat().invoke(CAPITAL)
    chunks = list(chat(stream_usage=True).stream(CAPITAL))
    assert len(chunks) > 3
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    assert total.content == whole.content
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]


@check("ainvoke, astream and batch")
async def asynchronous() -> None:
    answer = await chat().ainvoke(CAPITAL)
    text = "".join([chunk.content async for chunk in chat().astream(CAPITAL)])
    assert "Paris" in text
    assert text == answer.content
    batch = await chat().abatch([CAPITAL] * 4)
    assert {each.content for each in batch} == {text}


@check("bind_tools: any, and the result sent back")
def tools() -> None:
    asking = chat(max_tokens=80).bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
    question = HumanMessage("What is the weather in Oslo?")
    answer = asking.invoke([question])
    (call,) = answer.tool_calls
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    after = chat(max_tokens=12).bind_tools([weather]).invoke([question, answer, result])
    assert after.content or after.tool_calls


@check("bind_tools: a named tool, streamed")
def streamed_tools() -> None:
    asking = chat().bind_tools([weather], tool_choice="weather")
    whole = asking.invoke(CAPITAL)
    chunks = list(asking.stream(CAPITAL))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    (call,) = total.tool_calls
    assert call["args"] == whole.tool_calls[0]["args"]
    assert call["args"]["city"] in ("Paris", "Oslo", "Lima")


@check("bind_tools: auto")
def auto_tools() -> None:
    answer = chat(max_tokens=12).bind_tools([weather]).invoke(CAPITAL)
    assert answer.content or answer.tool_calls


@check("with_structured_output: json_schema, function_calling, json_mode, strict")
def structured() -> None:
    for values in (
        {},
        {"method": "json_schema", "strict": True},
        {"method": "function_calling"},
        {"method": "function_calling", "strict": True},
    ):
        found = chat().with_structured_output(Visit, **values).invoke(CAPITAL)
        assert isinstance(found, Visit), (values, found)
    found = (
        chat(max_tokens=200).with_structured_output(None, method="json_mode").invoke(CAPITAL + " Use JSON.")
    )
    assert isinstance(found, dict)


@check("with_structured_output, streamed")
def streamed_structure() -> None:
    schema = Visit.model_json_schema()
    pieces = list(chat().with_structured_output(schema).stream(CAPITAL))
    Visit.model_validate(pieces[-1])


@check("the Responses API (use_responses_api)")
def responses() -> None:
    api = chat(use_responses_api=True)
    answer = api.invoke(CAPITAL)
    assert answer.text
    text = "".join(chunk.text for chunk in api.stream(CAPITAL))
    assert text == answer.text
    called = api.bind_tools([weather], tool_choice="weather").invoke(CAPITAL)
    assert called.tool_calls[0]["name"] == "weather"


@check("completions: generate with several prompts, stream")
def completions() -> None:
    model = OpenAI(model=MODEL, base_url=BASE, api_key=KEY, temperature=0, max_tokens=6, max_retries=0)
    found = model.generate(["One, two,", "The sky is"])
    assert len(found.generations) == 2
    assert "".join(model.stream("One, two,")) == found.generations[0][0].text


@check("embeddings")
def embeddings() -> None:
    model = OpenAIEmbeddings(model=MODEL, base_url=BASE, api_key=KEY, check_embedding_ctx_length=False)
    assert len(model.embed_documents(["a cat", "a dog"])) == 2
    assert len(model.embed_query("a cat")) > 100


main("langchain-openai", "langchain-core", "openai")
