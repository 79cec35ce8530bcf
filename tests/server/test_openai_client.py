"""The official client, unmodified, against a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.server.conftest import make_app, running
from tests.server.fake_engine import TEXT, FakeEngine

USER: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def api(engine: FakeEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        running(make_app(engine, api_key=["the-key"])) as port,
        openai.AsyncOpenAI(
            api_key="the-key", base_url=f"http://127.0.0.1:{port}/v1/", max_retries=0
        ) as client,
    ):
        yield client


async def test_models(api: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in api.models.list()] == ["fake", "alias"]
    assert (await api.models.retrieve("alias")).id == "alias"


async def test_completion(api: openai.AsyncOpenAI) -> None:
    answer = await api.completions.create(model="fake", prompt="x", max_tokens=5, n=2, logprobs=1, seed=1)
    assert [choice.text for choice in answer.choices] == [TEXT[:5], TEXT[1:6]]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == list(TEXT[:5])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10
    assert answer.choices[0].finish_reason == "length"


async def test_streamed_completion(api: openai.AsyncOpenAI) -> None:
    text = ""
    stream = await api.completions.create(model="fake", prompt="x", max_tokens=5, stream=True)
    async for chunk in stream:
        assert chunk.object == "text_completion"
        text += chunk.choices[0].text
    assert text == TEXT[:5]


async def test_chat(api: openai.AsyncOpenAI) -> None:
    answer = await api.chat.completions.create(
        model="fake", messages=USER, max_completion_tokens=5, n=2, logprobs=True, top_logprobs=2, stop=["@"]
    )
    assert [choice.message.content for choice in answer.choices] == [TEXT[:5], TEXT[1:6]]
    assert answer.choices[0].message.role == "assistant"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == list(TEXT[:5])
    assert len(logprobs.content[0].top_logprobs) == 2


async def test_streamed_chat(api: openai.AsyncOpenAI) -> None:
    texts = {0: "", 1: ""}
    ends: dict[int, str] = {}
    usage = None
    stream = await api.chat.completions.create(
        model="fake", messages=USER, max_tokens=5, n=2, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == {0: TEXT[:5], 1: TEXT[1:6]}
    assert ends == {0: "length", 1: "length"}
    assert usage is not None
    assert usage.completion_tokens == 10


async def test_the_accumulating_stream(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.finish_reason = "stop"
    async with api.chat.completions.stream(model="fake", messages=USER, max_tokens=5) as stream:
        async for _ in stream:
            pass
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.content == TEXT[:5]


async def test_errors(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p") as bad:
        await api.chat.completions.create(model="fake", messages=USER, top_p=0)
    assert (bad.value.param, bad.value.type) == ("top_p", "BadRequestError")
    with pytest.raises(openai.NotFoundError, match="`nope`"):
        await api.chat.completions.create(model="nope", messages=USER)
    with pytest.raises(openai.AuthenticationError):
        await api.with_options(api_key="wrong").models.list()
    engine.fail_after = 0
    with pytest.raises(openai.InternalServerError, match="failed on demand"):
        await api.completions.create(model="fake", prompt="x")


async def test_an_error_in_a_stream(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.fail_after = 2
    stream = await api.chat.completions.create(model="fake", messages=USER, stream=True)
    text = ""
    with pytest.raises(openai.APIError, match="failed on demand"):
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text == TEXT[:2]


async def test_leaving_a_stream_aborts(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    from tests.server.conftest import until

    engine.tick = 0.002
    stream = await api.chat.completions.create(model="fake", messages=USER, max_tokens=2000, stream=True)
    await anext(aiter(stream))
    await stream.close()
    await until(lambda: len(engine.aborted) == 1)
