"""priority, timeout and cache_salt in bodies, cached tokens in usage, and a full queue."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from aserve.errors import QueueFullError, RequestTimeoutError
from aserve.messages.inputs import RequestOptions
from tests.server.conftest import events
from tests.server.fake_engine import FakeEngine

CALLS = {
    "/v1/completions": {"model": "fake", "prompt": "ab", "max_tokens": 3},
    "/v1/chat/completions": {
        "model": "fake",
        "messages": [{"role": "user", "content": "ab"}],
        "max_tokens": 3,
    },
}
every_call = pytest.mark.parametrize("url", CALLS)


async def post(client: Any, url: str, **values: Any) -> Any:
    return await client.post(url, json={**CALLS[url], **values})


@every_call
async def test_options_reach_the_engine(client: Any, engine: FakeEngine, url: str) -> None:
    await post(client, url, priority=-2, timeout=1.5, cache_salt="s")
    await post(client, url)
    await post(client, url, timeout=None, cache_salt=None)
    assert [call.options for call in engine.submitted] == [
        RequestOptions(-2, 1.5, "s"),
        RequestOptions(),
        RequestOptions(),
    ]


@every_call
@pytest.mark.parametrize(
    ("param", "value"),
    [("timeout", 0), ("timeout", -1), ("cache_salt", ""), ("priority", 1 << 40), ("priority", "high")],
)
async def test_options_that_make_no_sense(client: Any, url: str, param: str, value: Any) -> None:
    answer = await post(client, url, **{param: value})
    assert answer.status_code == 400
    assert param in (await answer.get_json())["error"]["message"]


@every_call
async def test_cached_tokens_in_usage(client: Any, engine: FakeEngine, url: str) -> None:
    assert "prompt_tokens_details" not in (await (await post(client, url)).get_json())["usage"]
    engine.cached = 2
    answer = await (await post(client, url)).get_json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    streamed = await post(client, url, stream=True, stream_options={"include_usage": True})
    last = events(await streamed.get_data())[-2]
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_cached_tokens_of_several_prompts_add_up(client: Any, engine: FakeEngine) -> None:
    engine.cached = 2
    for stream in (False, True):
        values = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        answer = await post(client, "/v1/completions", prompt=["a", "b", "c"], n=2, **values)
        data = await answer.get_data()
        found = events(data)[-2] if stream else orjson.loads(data)
        assert found["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}


@every_call
@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue(
    client: Any, engine: FakeEngine, url: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.full = QueueFullError("the server is overloaded: try again later", retry_after=2.2)

    async def encode(*_: Any) -> None:
        raise AssertionError("a refused prompt was tokenised")

    monkeypatch.setattr(engine, "encode_prompt", encode)
    answer = await post(client, url, stream=stream)
    assert answer.status_code == 429
    assert answer.headers["Retry-After"] == "3"
    assert (await answer.get_json())["error"]["type"] == "RateLimitError"
    assert not engine.submitted


@every_call
async def test_a_timeout(client: Any, engine: FakeEngine, url: str) -> None:
    engine.fail_after, engine.failure = 1, RequestTimeoutError("took too long", param="timeout")
    answer = await post(client, url)
    assert answer.status_code == 408
    assert (await answer.get_json())["error"]["type"] == "RequestTimeoutError"
    streamed = await post(client, url, stream=True)
    assert streamed.status_code == 200
    found = events(await streamed.get_data())
    assert found[-2]["error"]["code"] == 408 and found[-1] == "[DONE]"
