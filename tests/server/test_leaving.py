"""Clients that leave at an awkward moment, and clients that neither read nor leave."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypercorn.asyncio import serve
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, RawData
from hypercorn.protocol.events import Body, EndBody, Request, StreamClosed
from quart import Quart, Response

from aserve.server import pipelining
from aserve.server.connection import EventStream
from aserve.server.exchange import Exchange
from aserve.server.pipelining import ReadingH11Protocol, table
from aserve.server.serve import listen
from tests.server.conftest import make_app, post, running, until
from tests.server.fake_engine import FakeEngine
from tests.server.test_exchange import Spawner, served

COMPLETIONS = "/v1/completions"
LONG = {"model": "fake", "prompt": "x", "max_tokens": 4000}


# ---------------------------------------------------------------- with the end of the body


@pytest.mark.parametrize("turns", range(8))
async def test_leaving_with_the_end_of_the_body(app: Quart, engine: FakeEngine, turns: int) -> None:
    """However many turns of the loop lie between: none of them may lose the news."""

    async def wrapped(scope: Any, receive: Any, send: Any, *_: Any) -> None:
        await app(scope, receive, send)

    async def send(event: Any) -> None:
        pass

    engine.gate.clear()  # a request that nobody ends stays for ever
    spawner = Spawner()
    exchange = Exchange(wrapped, Config(), SimpleNamespace(), spawner, False, ("c", 1), ("s", 2), send, 1)
    data = orjson.dumps({**LONG, "stream": True})
    headers = [(b"host", b"h"), (b"content-length", b"%d" % len(data))]
    await exchange.handle(Request(1, headers, "1.1", "POST", COMPLETIONS.encode(), {}))
    await asyncio.sleep(0.02)  # the handler waits for the body
    await exchange.handle(Body(1, data))
    await exchange.handle(EndBody(1))
    for _ in range(turns):
        await asyncio.sleep(0)
    await exchange.handle(StreamClosed(1))
    await asyncio.wait_for(asyncio.wait(spawner.tasks), 5)
    assert not engine.num_unfinished
    assert sorted(engine.aborted) == sorted(each.id for each in engine.submitted)


# ---------------------------------------------------------------- bytes that nobody takes


async def endless() -> AsyncIterator[bytes]:
    while True:
        await asyncio.sleep(0)
        yield b"data: " + b"x" * 100_000 + b"\n\n"


def big_app() -> Quart:
    app = make_app(FakeEngine())

    @app.get("/big")
    async def big() -> Response:
        return EventStream(endless())

    @app.get("/whole")
    async def whole() -> Response:
        return Response(b"x" * 8_000_000)

    return app


async def connect(port: int, request: str) -> socket.socket:
    """A connection on which nothing is read unless the caller does."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    await asyncio.get_running_loop().sock_sendall(sock, request.encode())
    return sock


def unsent(connection: ReadingH11Protocol) -> bool:
    return connection.transport is not None and connection.transport.get_write_buffer_size() > 0


def stuck() -> bool:
    return any(map(unsent, table))


@pytest.mark.parametrize("path", ["/big", "/whole"])
async def test_a_half_closed_connection_that_is_not_read_ends(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(pipelining, "LINGER_SECONDS", 0.1)
    async with running(big_app()) as port:
        await asyncio.sleep(0.1)
        before = asyncio.all_tasks()
        sock = await connect(port, f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n")
        await until(stuck)
        sock.shutdown(socket.SHUT_WR)
        await until(lambda: asyncio.all_tasks() <= before)
        sock.close()


async def test_an_answered_connection_that_is_not_read_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelining, "LINGER_SECONDS", 0.1)
    async with running(big_app()) as port:
        await asyncio.sleep(0.1)
        before, held = asyncio.all_tasks(), len(table)
        sock = await connect(port, "GET /whole HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        await until(stuck)
        for connection in table:  # as one is closed that has been idle for longer than any other
            connection.drop()
        await until(lambda: asyncio.all_tasks() <= before and len(table) <= held)
        sock.close()


async def test_what_is_on_its_way_still_arrives_when_a_connection_is_closed() -> None:
    async with running(big_app()) as port:
        sock = await connect(port, "GET /whole HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        await until(stuck)
        size = 0
        while data := await asyncio.get_running_loop().sock_recv(sock, 1 << 20):
            size += len(data)
        sock.close()
    assert size > 8_000_000


async def test_clients_that_do_not_read_do_not_hold_up_the_end() -> None:
    stop = asyncio.Event()
    task, port = await served(big_app(), stop, graceful_timeout=0.2)
    await asyncio.sleep(0.05)
    socks = [await connect(port, f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n") for path in ("/big", "/whole")]
    await until(lambda: sum(map(unsent, table)) >= 2)
    stop.set()
    await asyncio.wait_for(task, 10)
    for sock in socks:
        sock.close()


async def test_leaving_between_two_pipelined_requests() -> None:
    """The first is answered, the second not yet looked at: nobody may begin it any more."""
    begun = 0

    async def app(scope: Any, receive: Any, send: Any, *_: Any) -> None:
        nonlocal begun
        begun += 1
        while (await receive()).get("more_body"):
            pass
        await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def to_server(event: Any) -> None:
        pass

    go, spawner = asyncio.Event(), Spawner()
    protocol = ReadingH11Protocol(
        app, Config(), WorkerContext(None), spawner, {}, False, ("c", 1), ("s", 2), to_server
    )  # type: ignore[arg-type]
    await protocol.handle(RawData(2 * b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx"))
    assert protocol._paused
    go.set()
    while protocol._paused:  # noqa: ASYNC110 - every turn of the loop counts
        await asyncio.sleep(0)
    await protocol.handle(Closed())
    await asyncio.wait_for(asyncio.wait(spawner.tasks), 5)
    assert len(spawner.tasks) == 2  # the first request, and what took up the second
    assert begun == 1
    assert protocol.stream is None and protocol not in list(table)
    protocol._over(None)


@pytest.mark.parametrize("sent", ["", "POST /v1/compl", "POST /v1/completions HTTP/1.1\r\nHost: h\r\n"])
async def test_leaving_before_the_first_request_leaves_nothing(sent: str) -> None:
    stop = asyncio.Event()
    task, port = await served(make_app(FakeEngine()), stop, keep_alive_timeout=600.0)
    await asyncio.sleep(0.05)
    before = asyncio.all_tasks()
    sock = await connect(port, sent)
    await until(lambda: len(asyncio.all_tasks()) > len(before))
    sock.close()
    await until(lambda: asyncio.all_tasks() <= before)
    stop.set()
    await asyncio.wait_for(task, 10)


# ---------------------------------------------------------------- the table, and what comes ahead


async def test_a_connection_that_fails_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(self: Exchange) -> None:
        raise ArithmeticError("on demand")

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    async with running(make_app(FakeEngine())) as port:
        await asyncio.sleep(0.05)
        before = len(table)
        monkeypatch.setattr(Exchange, "_run", fails)
        sock = await connect(port, "GET /health/live HTTP/1.1\r\nHost: h\r\n\r\n")
        assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 99), 5) == b""
        sock.close()
        await until(lambda: len(table) <= before)


async def test_bytes_sent_ahead_are_bounded_over_all_answers(port: int, engine: FakeEngine) -> None:
    """And not anew with each of them: 200 kB ahead of every short request would otherwise heap up."""
    short = {"model": "fake", "prompt": "x", "max_tokens": 2}
    request = post(COMPLETIONS, short, "X-Filler: " + "y" * 10_000)
    engine.tick = 0.05
    engine.gate.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode())
    await until(lambda: len(engine.submitted) == 1)
    writer.write(20 * request.encode())
    await writer.drain()
    await asyncio.sleep(0.05)
    engine.gate.set()
    await until(lambda: len(engine.submitted) >= 2)
    engine.gate.clear()
    await asyncio.sleep(0.05)
    sent = len(engine.submitted)
    writer.write(20 * request.encode())
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        while True:
            await asyncio.wait_for(reader.readexactly(1), 5)
    writer.close()
    assert len(engine.submitted) == sent
    await until(lambda: not engine.num_unfinished)


async def test_the_time_for_a_head_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelining, "HEADER_SECONDS", 0.1)
    called, go = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Reads its body late."""
        if scope["type"] != "http":
            raise RuntimeError("nothing but http")
        called.set()
        await go.wait()
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    listener, stop, config = listen("127.0.0.1", 0), asyncio.Event(), Config()
    port = listener.getsockname()[1]
    config.bind, config.errorlog = [f"fd://{listener.detach()}"], None
    task = asyncio.create_task(serve(app, config, shutdown_trigger=stop.wait))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\nHost: h\r\n")
    await asyncio.sleep(0.02)
    writer.write(b"Transfer-Encoding: chunked\r\n\r\n" + 20 * b"1\r\na\r\n")
    await asyncio.wait_for(called.wait(), 5)
    await asyncio.sleep(0.3)
    go.set()
    writer.write(b"0\r\n\r\n")
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200")
    writer.close()
    stop.set()
    await asyncio.wait_for(task, 10)
