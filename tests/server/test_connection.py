"""Clients that leave, are silent, are slow, or send too much at once."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from quart import Quart, Response

from aserve.server.connection import Connection, EventStream, route_path
from tests.server.conftest import events, make_app, post, raw, running, until
from tests.server.fake_engine import FakeEngine

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
LONG = {"model": "fake", "max_tokens": 4000}
USER = [{"role": "user", "content": "x"}]

CALLS: dict[str, tuple[str, dict[str, Any], int]] = {
    "completion": (COMPLETIONS, {**LONG, "prompt": "x"}, 1),
    "completion streamed": (COMPLETIONS, {**LONG, "prompt": "x", "stream": True}, 1),
    "completion echoed": (COMPLETIONS, {**LONG, "prompt": "x", "stream": True, "echo": True}, 1),
    "completion n=4": (COMPLETIONS, {**LONG, "prompt": "x", "n": 4}, 1),
    "completion n=4 streamed": (COMPLETIONS, {**LONG, "prompt": "x", "n": 4, "stream": True}, 1),
    "completion best_of streamed": (COMPLETIONS, {**LONG, "prompt": "x", "best_of": 4, "stream": True}, 1),
    "prompts": (COMPLETIONS, {**LONG, "prompt": ["x", "y", "z"]}, 3),
    "prompts streamed": (COMPLETIONS, {**LONG, "prompt": ["x", "y", "z"], "stream": True}, 3),
    "chat": (CHAT, {**LONG, "messages": USER}, 1),
    "chat streamed": (CHAT, {**LONG, "messages": USER, "stream": True}, 1),
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], int]:
    return CALLS[request.param]


def all_aborted(engine: FakeEngine, count: int) -> Callable[[], bool]:
    def holds() -> bool:
        ids = sorted(request.id for request in engine.submitted)
        return len(ids) == count and sorted(engine.aborted) == ids and not engine.num_unfinished

    return holds


# ---------------------------------------------------------------- leaving, without sockets


async def test_leaving_before_the_first_token(client: Any, engine: FakeEngine, call: Any) -> None:
    path, body, count = call
    engine.gate.clear()
    async with client.request(path, method="POST") as connection:
        await send_json(connection, body)
        await until(lambda: len(engine.submitted) == count)
        await connection.disconnect()
        await until(all_aborted(engine, count))


async def test_leaving_midway(client: Any, engine: FakeEngine, call: Any) -> None:
    path, body, count = call
    engine.tick = 0.002
    async with client.request(path, method="POST") as connection:
        await send_json(connection, body)
        await until(lambda: len(engine.submitted) == count)
        if body.get("stream") and "best_of" not in body:
            assert (await connection.receive()).startswith(b"data: ")
        else:
            await asyncio.sleep(0.02)
        assert engine.num_unfinished == count
        await connection.disconnect()
        await until(all_aborted(engine, count))


async def test_leaving_after_the_end_aborts_nothing(client: Any, engine: FakeEngine) -> None:
    async with client.request(COMPLETIONS, method="POST") as connection:
        await send_json(connection, {"model": "fake", "prompt": "x", "stream": True, "max_tokens": 2})
        data = b""
        while not data.endswith(b"data: [DONE]\n\n"):
            data += await asyncio.wait_for(connection.receive(), 2)
        await connection.disconnect()
    assert not engine.aborted


async def test_leaving_while_tokenising_submits_nothing(client: Any, engine: FakeEngine) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def encode_prompt(text: str, add_special_tokens: bool = True) -> list[int]:
        started.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [1]

    engine.encode_prompt = encode_prompt  # type: ignore[method-assign]
    async with client.request(COMPLETIONS, method="POST") as connection:
        await send_json(connection, {**LONG, "prompt": "x"})
        await asyncio.wait_for(started.wait(), 2)
        await connection.disconnect()
        await asyncio.wait_for(cancelled.wait(), 2)
    assert not engine.submitted


async def send_json(connection: Any, body: dict[str, Any]) -> None:
    import orjson

    await connection.send(orjson.dumps(body))
    await connection.send_complete()


# ---------------------------------------------------------------- leaving, with sockets


async def connect(port: int, request: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode())
    await writer.drain()
    return reader, writer


def reset(writer: asyncio.StreamWriter) -> None:
    """Closes with RST instead of FIN."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.mark.parametrize("how", ["FIN", "RST", "half"])
async def test_leaving_a_real_server(port: int, engine: FakeEngine, call: Any, how: str) -> None:
    path, body, count = call
    engine.tick = 0.002
    reader, writer = await connect(port, post(path, body))
    if body.get("stream"):
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    await until(lambda: len(engine.submitted) == count)
    if how == "RST":
        reset(writer)
    elif how == "FIN":
        writer.close()
    else:
        writer.write_eof()
    await until(all_aborted(engine, count))
    writer.close()


async def test_a_crowd_that_leaves(port: int, engine: FakeEngine) -> None:
    engine.tick = 0.01
    writers = []
    for number in range(40):
        path, body, _ = list(CALLS.values())[number % len(CALLS)]
        writers.append((await connect(port, post(path, body)))[1])
    await until(lambda: len({request.id.rsplit("-", 1)[0] for request in engine.submitted}) == 40)
    for number, writer in enumerate(writers):
        reset(writer) if number % 2 else writer.close()
    await until(all_aborted(engine, len(engine.submitted)))
    answer = await raw(port, post(COMPLETIONS, {**LONG, "prompt": "x", "max_tokens": 1}, "Connection: close"))
    assert answer.startswith(b"HTTP/1.1 200")


# ---------------------------------------------------------------- pipelining

SHORT = {"model": "fake", "prompt": "x", "max_tokens": 2}


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_pipelined_request_does_not_hide_a_disconnect(
    port: int, engine: FakeEngine, at_once: bool
) -> None:
    engine.gate.clear()
    first, second = post(COMPLETIONS, {**LONG, "prompt": "x"}), post(COMPLETIONS, SHORT)
    _, writer = await connect(port, first + second if at_once else first)
    await until(lambda: len(engine.submitted) == 1)
    if not at_once:
        writer.write(second.encode())
        await writer.drain()
        await asyncio.sleep(0.02)
    writer.close()
    await until(all_aborted(engine, 1), seconds=1)


async def test_pipelined_requests_are_answered_in_order(port: int, engine: FakeEngine) -> None:
    requests = [post(COMPLETIONS, {**SHORT, "prompt": name, "echo": True}) for name in "abc"]
    # The last in two pieces, cut inside its body.
    last = post(COMPLETIONS, {**SHORT, "prompt": "d" * 3000, "echo": True}, "Connection: close")
    engine.gate.clear()
    reader, writer = await connect(port, "".join(requests) + last[:-2000])
    await until(lambda: len(engine.submitted) == 1)
    engine.gate.set()
    await asyncio.sleep(0.05)
    writer.write(last[-2000:].encode())
    data = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert data.count(b"HTTP/1.1 200") == 4
    places = [data.index(f'"text":"{name}'.encode()) for name in ("ath", "bth", "cth", "dddd")]
    assert places == sorted(places)


async def test_too_much_pipelined_closes_the_connection(port: int, engine: FakeEngine) -> None:
    engine.gate.clear()
    _, writer = await connect(port, post(COMPLETIONS, {**LONG, "prompt": "x"}) + post(COMPLETIONS, SHORT))
    await until(lambda: len(engine.submitted) == 1)
    writer.write(b"x" * 400_000)
    await until(all_aborted(engine, 1))
    writer.close()


async def test_keep_alive_and_bodies_in_pieces(port: int, engine: FakeEngine) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(3):
        request = post(COMPLETIONS, {**SHORT, "prompt": "y" * 3000}).encode()
        for start in range(0, len(request), 1000):
            writer.write(request[start : start + 1000])
            await asyncio.sleep(0.002)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert head.startswith(b"HTTP/1.1 200")
        await reader.readexactly(length)
    writer.close()


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
async def test_only_http_1_is_spoken(port: int, upgrade: str) -> None:
    lines = f"Connection: Upgrade\r\nUpgrade: {upgrade}\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
    lines += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    reader, writer = await connect(port, f"GET /v1/models HTTP/1.1\r\nHost: h\r\n{lines}\r\n")
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    writer.close()
    assert b"101" not in head.split(b"\r\n")[0]
    answer = await raw(port, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 4")


# ---------------------------------------------------------------- the bridge


def small_app(make: Callable[[], Response]) -> Quart:
    app = make_app(FakeEngine())

    @app.get("/bridge")
    async def bridge() -> Response:
        return make()

    return app


async def slowly(count: int, pause: float) -> AsyncIterator[bytes]:
    for number in range(count):
        await asyncio.sleep(pause)
        yield b"data: %d\n\n" % number


async def test_a_stream_outlives_the_response_timeout() -> None:
    app = small_app(lambda: EventStream(slowly(5, 0.06)))
    app.config["RESPONSE_TIMEOUT"] = 0.1
    async with running(app) as port:
        answer = await raw(port, "GET /bridge HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert answer.count(b"data: ") == 5
    assert answer.endswith(b"0\r\n\r\n")


async def test_pings_fill_silence() -> None:
    app = small_app(lambda: EventStream(slowly(2, 0.1), ping=0.03))
    async with app.test_app():
        data = await (await app.test_client().get("/bridge")).get_data()
    assert data.count(b": ping\n\n") >= 2
    assert b"\r" not in data
    assert [line for line in data.split(b"\n\n") if line.startswith(b"data")] == [b"data: 0", b"data: 1"]


async def test_a_stream_cancelled_before_its_first_event_is_closed() -> None:
    started, closed = [], []

    async def never() -> AsyncIterator[bytes]:
        started.append(True)
        yield b""

    async def send(message: Any) -> None:
        await asyncio.sleep(30)  # the head of the response never leaves

    scope: Any = {"type": "http", "method": "GET", "path": "/"}
    connection = Connection(make_app(FakeEngine()), scope)
    response = EventStream(never(), on_close=lambda: closed.append(True))
    task = asyncio.create_task(connection._send_response(send, response))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed == [True]
    assert not started


async def test_a_client_that_does_not_read_is_given_up() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0)
            yield b"data: " + b"x" * 100_000 + b"\n\n"

    app = small_app(lambda: EventStream(endless(), on_close=closed.set, send_timeout=0.1))
    async with running(app) as port:
        _, writer = await connect(port, "GET /bridge HTTP/1.1\r\nHost: h\r\n\r\n")
        await asyncio.wait_for(closed.wait(), 10)
        reset(writer)


async def test_hooks_see_a_streams_headers() -> None:
    app = small_app(lambda: EventStream(slowly(1, 0)))

    @app.after_request
    async def stamp(response: Response) -> Response:
        response.headers["X-Stamp"] = "1"
        return response

    async with app.test_app():
        answer = await app.test_client().get("/bridge")
    assert answer.headers["X-Stamp"] == "1"
    assert events(await answer.get_data()) == [0]


@pytest.mark.parametrize(
    ("path", "root", "routed"),
    [
        ("/a", "", "/a"),
        ("//a///b/", "", "/a/b/"),
        ("http://h/a", "", "/a"),
        ("http://h", "", "/"),
        ("", "", "/"),
        ("*", "", "/*"),
        ("/r", "/r", "/"),
        ("/r/a", "/r", "/a"),
        ("/ra", "/r", "/ra"),
        ("//r//a", "/r", "/a"),
        ("/r/r/a", "/r", "/r/a"),
        ("http://h/r/a", "/r", "/a"),
    ],
)
def test_routed_paths(path: str, root: str, routed: str) -> None:
    assert route_path(path, root) == routed
