from __future__ import annotations

import re
from typing import Any

import pytest

from aserve.errors import (
    AserveError,
    EngineBusyError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
)
from tests.server.conftest import events, make_app
from tests.server.fake_engine import FakeEngine

URL = "/v1/completions"
BODY = {"model": "fake", "prompt": "x", "max_tokens": 4}

LEAKS = re.compile(r'0x[0-9a-f]+|Traceback|File "|/work|/usr|\.py')


async def check_body(answer: Any, status: int, kind: str, param: str | None = None) -> str:
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/json"
    text = (await answer.get_data()).decode()
    assert not LEAKS.search(text)
    found = await answer.get_json()
    nested = found.pop("error")
    assert found.pop("object") == "error"
    assert found == nested
    assert found.pop("message")
    assert found == {"type": kind, "param": param, "code": status}
    return nested["message"]


async def test_unknown_model(client: Any) -> None:
    answer = await client.post(URL, json={**BODY, "model": "nope"})
    assert "`nope`" in await check_body(answer, 404, "NotFoundError", "model")


@pytest.mark.parametrize(
    "data", ["", "{", "[1]", "null", '{"model":"fake","prompt":"x","temperature":NaN}', "[" * 10000, "\xff"]
)
async def test_malformed_bodies(client: Any, data: str) -> None:
    answer = await client.post(URL, data=data.encode("latin-1"))
    await check_body(answer, 400, "BadRequestError")


async def test_missing_and_misfit_fields_are_named(client: Any) -> None:
    answer = await client.post(URL, json={"prompt": "x"})
    assert "model: Field required [missing]" in await check_body(answer, 400, "BadRequestError", "model")
    answer = await client.post(URL, json={**BODY, "temperature": "secret-value"})
    message = await check_body(answer, 400, "BadRequestError", "temperature")
    assert "secret-value" not in message


async def test_suffix(client: Any) -> None:
    answer = await client.post(URL, json={**BODY, "suffix": "y"})
    await check_body(answer, 400, "BadRequestError", "suffix")


async def test_any_content_type_is_read_as_json(client: Any) -> None:
    import json

    for content_type in ("application/x-www-form-urlencoded", "text/plain", "application/json"):
        answer = await client.post(URL, data=json.dumps(BODY), headers={"Content-Type": content_type})
        assert answer.status_code == 200
    answer = await client.post(URL, data=json.dumps(BODY), headers={"Content-Encoding": "gzip"})
    await check_body(answer, 415, "BadRequestError")


async def test_unknown_path_and_wrong_method(client: Any) -> None:
    await check_body(await client.get("/v1/nothing"), 404, "NotFoundError")
    answer = await client.get("/v1/completions")
    await check_body(answer, 405, "BadRequestError")
    assert "POST" in answer.headers["Allow"]


async def test_too_large_a_body(engine: FakeEngine) -> None:
    app = make_app(engine, max_body_size=100)
    async with app.test_app():
        client = app.test_client()
        assert (await client.post(URL, json=BODY)).status_code == 200
        answer = await client.post(URL, json={**BODY, "prompt": "x" * 100})
        await check_body(answer, 413, "BadRequestError")


FAILURES: list[tuple[AserveError, int, str]] = [
    (InvalidRequestError("bad", param="prompt"), 400, "BadRequestError"),
    (QueueFullError("full", retry_after=2.5), 429, "RateLimitError"),
    (EngineBusyError("busy"), 503, "ServiceUnavailableError"),
    (RequestFailedError("failed"), 500, "InternalServerError"),
    (EngineDeadError("dead"), 500, "InternalServerError"),
]


@pytest.mark.parametrize(("failure", "status", "kind"), FAILURES, ids=lambda value: type(value).__name__)
async def test_failures_of_the_engine(
    client: Any, engine: FakeEngine, failure: AserveError, status: int, kind: str
) -> None:
    engine.fail_after, engine.failure = 2, failure
    answer = await client.post(URL, json=BODY)
    await check_body(answer, status, kind, failure.param)
    retry_after = {429: "3", 503: "1"}.get(status)
    assert answer.headers.get("Retry-After") == retry_after

    answer = await client.post(URL, json={**BODY, "stream": True})
    assert answer.status_code == 200
    *chunks, error, done = events(await answer.get_data())
    assert len(chunks) == 2
    assert error == {
        "error": {
            "object": "error",
            "message": failure.message,
            "type": kind,
            "param": failure.param,
            "code": status,
        }
    }
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
async def test_what_nobody_expected(
    client: Any, engine: FakeEngine, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail_after, engine.failure = 0, ZeroDivisionError("at 0x7f00 in /usr/lib/secret.py")  # type: ignore[assignment]
    answer = await client.post(URL, json={**BODY, "stream": stream})
    text = (await answer.get_data()).decode()
    assert not LEAKS.search(text)
    if stream:
        error, done = events(text.encode())
        assert (error["error"]["code"], done) == (500, "[DONE]")
    else:
        await check_body(answer, 500, "InternalServerError")
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)


async def test_a_chat_that_fails_at_once_streams_no_role(client: Any, engine: FakeEngine) -> None:
    engine.fail_after = 0
    body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "stream": True}
    answer = await client.post("/v1/chat/completions", json=body)
    error, done = events(await answer.get_data())
    assert error["error"]["code"] == 503
    assert done == "[DONE]"


async def test_one_refused_prompt_admits_none(client: Any, engine: FakeEngine) -> None:
    engine.gate.clear()
    submit = engine.submit

    async def refuse_third(*args: Any, **kwargs: Any) -> Any:
        if len(engine.submitted) == 2:
            raise QueueFullError("full")
        return await submit(*args, **kwargs)

    engine.submit = refuse_third  # type: ignore[method-assign]
    answer = await client.post(URL, json={**BODY, "prompt": ["a", "b", "c"], "stream": True})
    await check_body(answer, 429, "RateLimitError")
    assert engine.aborted == [request.id for request in engine.submitted]
