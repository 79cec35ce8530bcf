"""The load generator's HTTP: framing, timing, keep-alive, and what counts as a failure."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from aserve.bench.client import Answer, Client
from aserve.errors import ConfigError

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[str]:
    """A server that runs ``script`` for each connection; its address."""
    tasks: set[asyncio.Task[Any]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await script(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()


async def read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next(
        (int(x.split(":")[1]) for x in head.splitlines() if x.lower().startswith("content-length")), 0
    )
    return head, await reader.readexactly(length)


def event(text: str | None = None, **more: Any) -> bytes:
    payload = {"choices": [] if text is None else [{"text": text, "finish_reason": None}], **more}
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


USAGE = event(usage={"prompt_tokens": 7, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def answering(*pieces: bytes, pause: float = 0.0) -> Script:
    """Reads a request, then writes the pieces; the connection then closes."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    return script


async def ask(*pieces: bytes, pause: float = 0.0) -> Answer:
    async with scripted(answering(*pieces, pause=pause)) as url:
        client = Client(url)
        try:
            return await asyncio.wait_for(client.stream("/v1/completions", {"stream": True}), 5)
        finally:
            client.close()


BODY = event("a") + event("b") + event("c") + USAGE + DONE


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([HEAD + b"\r\n" + BODY], id="until the connection ends"),
        pytest.param([HEAD + f"Content-Length: {len(BODY)}\r\n\r\n".encode(), BODY], id="length"),
        pytest.param(
            [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk(BODY), b"0\r\n\r\n"], id="one chunk"
        ),
        pytest.param(
            [
                bytes([each])
                for each in HEAD
                + b"Transfer-Encoding: chunked\r\n\r\n"
                + chunk(BODY[:30])
                + chunk(BODY[30:])
                + b"0\r\n\r\n"
            ],
            id="byte by byte",
        ),
        pytest.param([HEAD + b"\r\n" + BODY.replace(b"\n", b"\r\n")], id="CRLF"),
        pytest.param([HEAD + b"\r\n: ping\n\n" + BODY], id="comment"),
    ],
)
async def test_an_answer_is_read_however_it_is_cut(pieces: list[bytes]) -> None:
    answer = await ask(*pieces)
    assert answer.error is None
    assert (answer.prompt_tokens, answer.output_tokens, len(answer.itl)) == (7, 3, 2)


async def test_times_are_those_of_the_tokens() -> None:
    pieces = [HEAD + b"\r\n", event("a"), event("b"), USAGE, DONE]
    answer = await ask(*pieces, pause=0.05)
    assert answer.error is None
    assert 0.04 <= answer.ttft <= answer.latency
    # The usage event is no token: it neither counts as a gap nor delays the end.
    assert len(answer.itl) == 1
    assert answer.latency == pytest.approx(answer.ttft + answer.itl[0])
    assert answer.tpot == pytest.approx((answer.latency - answer.ttft) / 2)


async def test_without_usage_events_are_counted() -> None:
    answer = await ask(HEAD + b"\r\n" + event("a") + event("b") + DONE)
    assert (answer.error, answer.prompt_tokens, answer.output_tokens) == (None, 0, 2)


async def test_the_opening_chunk_of_a_chat_is_no_token() -> None:
    def delta(**values: Any) -> bytes:
        return b"data: " + json.dumps({"choices": [{"delta": values}]}).encode() + b"\n\n"

    answer = await ask(HEAD + b"\r\n" + delta(role="assistant", content="") + delta(content="x") + DONE)
    assert (answer.error, answer.output_tokens) == (None, 1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nfull", "status 503: full"),
        (HEAD + b"\r\n" + event("a"), "ended early"),
        (HEAD + b"\r\n" + event("a") + b'data: {"error": {"message": "broken"}}\n\n' + DONE, "broken"),
        (HEAD + b"Content-Length: 100\r\n\r\n" + event("a"), "ConnectionResetError"),
        (b"nonsense\r\n\r\n", "not an HTTP answer"),
        (HEAD + b"\r\ndata: {oops\n\n" + DONE, "not JSON"),
    ],
)
async def test_failures_are_told(answer: bytes, message: str) -> None:
    found = await ask(answer)
    assert found.error is not None and message in found.error


async def test_no_server_is_a_failed_answer() -> None:
    async with scripted(answering()) as url:
        pass
    answer = await Client(url).stream("/", {})
    assert answer.error is not None and "Connect" in answer.error


async def test_a_connection_serves_one_answer_after_the_other() -> None:
    connections = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(2):
            head, body = await read_request(reader)
            assert head.startswith("POST /prefix/v1/completions HTTP/1.1\r\n")
            assert "Authorization: Bearer k\r\n" in head
            assert json.loads(body) == {"n": 1}
            writer.write(HEAD + f"Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY)
        writer.write(b"")

    async with scripted(script) as url:
        client = Client(url + "/prefix/", {"Authorization": "Bearer k"})
        for _ in range(4):
            answer = await asyncio.wait_for(client.stream("/v1/completions", {"n": 1}), 5)
            assert answer.error is None
            await asyncio.sleep(0.02)  # lets the end of the second connection arrive
        client.close()
    assert connections == 2


async def test_a_kept_connection_that_was_given_up_is_replaced() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + f"Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY)
        await asyncio.sleep(0.02)  # then the server closes

    async with scripted(script) as url:
        client = Client(url)
        assert (await client.stream("/", {})).error is None
        time.sleep(0.1)  # noqa: ASYNC251 - the loop must not see the end before the next request
        assert (await client.stream("/", {})).error is None
        client.close()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://"])
def test_an_address_must_be_one(url: str) -> None:
    with pytest.raises(ConfigError, match="not an http"):
        Client(url)
