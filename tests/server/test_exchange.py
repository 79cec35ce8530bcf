"""Requests that reach the application without a queue, and connections between two of them."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypercorn.asyncio import serve
from hypercorn.config import Config
from hypercorn.protocol.events import Body, EndBody, Request, StreamClosed
from quart import Quart
from quart import request as asked
from werkzeug.datastructures import Headers

from aserve.server import service
from aserve.server.exchange import Exchange
from aserve.server.request import RequestHeaders
from aserve.server.serve import listen
from tests.server.conftest import make_app, post, raw, running, until
from tests.server.fake_engine import FakeEngine

COMPLETIONS = "/v1/completions"
SHORT = {"model": "fake", "prompt": "x", "max_tokens": 2}


# ---------------------------------------------------------------- one exchange by hand


class Spawner:
    """Stands in for Hypercorn's task group."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def spawn(self, function: Any, *args: Any) -> None:
        self.tasks.append(asyncio.ensure_future(function(*args)))


class Recorder:
    """An application that waits to be told; ``scope`` and ``receive`` as it got them."""

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.over = asyncio.Event()
        self.receive: Any = None
        self.scope: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any, spawn: Any, call_soon: Any) -> None:
        self.scope, self.receive = scope, receive
        self.called.set()
        await self.over.wait()


async def begun(app: Any) -> tuple[Exchange, list[Any], Spawner]:
    """An exchange whose request has come, and what it tells its connection."""
    said: list[Any] = []

    async def send(event: Any) -> None:
        said.append(event)

    spawner = Spawner()
    exchange = Exchange(app, Config(), SimpleNamespace(), spawner, False, ("c", 1), ("s", 2), send, 1)
    await exchange.handle(Request(1, [(b"host", b"h")], "1.1", "POST", b"/a%20b?q=1", {}))
    await asyncio.sleep(0)
    return exchange, said, spawner


async def test_an_application_that_asks_gets_every_message_in_order() -> None:
    app = Recorder()
    exchange, _, _ = await begun(app)
    assert app.scope["path"] == "/a b" and app.scope["raw_path"] == b"/a%20b"
    assert app.scope["query_string"] == b"q=1" and app.scope["client"] == ("c", 1)
    waiting = asyncio.ensure_future(app.receive())
    await asyncio.sleep(0)
    assert not waiting.done()
    for event in (Body(1, b"one"), Body(1, b"two"), EndBody(1), StreamClosed(1)):
        await exchange.handle(event)
    found = [await waiting, *[await app.receive() for _ in range(3)]]
    assert [message.get("body") for message in found] == [b"one", b"two", b"", None]
    assert [message.get("more_body") for message in found] == [True, True, False, None]
    assert found[-1] == {"type": "http.disconnect"}


async def test_a_body_that_nobody_reads_waits_outside() -> None:
    app = Recorder()
    exchange, _, _ = await begun(app)
    most = exchange.config.max_app_queue_size
    for number in range(most):
        await exchange.handle(Body(1, b"%d" % number))
    late = asyncio.ensure_future(exchange.handle(Body(1, b"late")))
    await asyncio.sleep(0.01)
    assert not late.done()
    assert (await app.receive())["body"] == b"0"
    await asyncio.wait_for(late, 5)
    found = [(await app.receive())["body"] for _ in range(most)]
    assert found == [b"%d" % number for number in range(1, most)] + [b"late"]


async def test_a_function_gets_what_is_there_and_what_comes() -> None:
    app = Recorder()
    exchange, _, _ = await begun(app)
    for number in range(exchange.config.max_app_queue_size):
        await exchange.handle(Body(1, b"%d" % number))
    late = asyncio.ensure_future(exchange.handle(Body(1, b"late")))
    await asyncio.sleep(0)
    taken: list[Any] = []
    exchange.hand_to(taken.append)
    await asyncio.wait_for(late, 5)
    await exchange.handle(EndBody(1))
    await exchange.handle(StreamClosed(1))
    await exchange.handle(StreamClosed(1))
    bodies = [message["body"] for message in taken[:-1]]
    assert bodies == [b"%d" % number for number in range(exchange.config.max_app_queue_size)] + [b"late", b""]
    assert taken[-1] == {"type": "http.disconnect"}


async def test_a_waiting_body_is_let_go_when_the_client_has_left() -> None:
    exchange, _, _ = await begun(Recorder())
    for _ in range(exchange.config.max_app_queue_size):
        await exchange.handle(Body(1, b"x"))
    late = asyncio.ensure_future(exchange.handle(Body(1, b"late")))
    await asyncio.sleep(0)
    await exchange.handle(StreamClosed(1))
    await asyncio.wait_for(late, 5)


async def test_an_application_that_fails_is_answered_for() -> None:
    async def failing(*_: Any) -> None:
        raise ArithmeticError("on demand")

    exchange, said, spawner = await begun(failing)
    exchange.config.errorlog = None
    await asyncio.wait_for(spawner.tasks[0], 5)
    assert said[0].status_code == 500


# ---------------------------------------------------------------- connections between requests


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request and its whole answer, which leaves the connection open."""
    writer.write(post(COMPLETIONS, SHORT).encode())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert head.startswith(b"HTTP/1.1 200")
    await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))


async def served(app: Quart, stop: asyncio.Event, **settings: Any) -> tuple[asyncio.Task[None], int]:
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.errorlog = None
    for name, value in settings.items():
        setattr(config, name, value)
    return asyncio.create_task(serve(app, config, shutdown_trigger=stop.wait)), port


@pytest.mark.parametrize("requests", [0, 1, 3])
async def test_an_idle_connection_is_closed_after_its_time(requests: int) -> None:
    stop = asyncio.Event()
    task, port = await served(make_app(FakeEngine()), stop, keep_alive_timeout=0.2)
    await asyncio.sleep(0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(requests):
        await ask(reader, writer)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    stop.set()
    await asyncio.wait_for(task, 10)


async def test_a_request_that_takes_longer_than_idleness_may_is_answered() -> None:
    engine, stop = FakeEngine(), asyncio.Event()
    task, port = await served(make_app(engine), stop, keep_alive_timeout=0.05)
    await asyncio.sleep(0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await ask(reader, writer)
    engine.gate.clear()
    asking = asyncio.ensure_future(ask(reader, writer))
    await until(lambda: engine.num_unfinished == 1)
    await asyncio.sleep(0.2)
    engine.gate.set()
    await asyncio.wait_for(asking, 10)
    writer.close()
    stop.set()
    await asyncio.wait_for(task, 10)


async def test_idle_connections_do_not_hold_up_the_end() -> None:
    stop = asyncio.Event()
    task, port = await served(make_app(FakeEngine()), stop, graceful_timeout=600.0, keep_alive_timeout=600.0)
    await asyncio.sleep(0.05)
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
    for reader, writer in connections[1:]:
        await ask(reader, writer)
    stop.set()
    for reader, writer in connections:
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
    await asyncio.wait_for(task, 10)


async def test_connections_leave_no_task_behind() -> None:
    async with running(make_app(FakeEngine())) as port:
        await asyncio.sleep(0.1)
        before = len(asyncio.all_tasks())
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await ask(reader, writer)
            writer.close()
        await until(lambda: len(asyncio.all_tasks()) <= before)


# ---------------------------------------------------------------- requests


def test_ids_are_used_once_and_not_shared_with_a_fork() -> None:
    found = {service.new_id("x") for _ in range(3 * service.IDS_AT_ONCE)}
    assert len(found) == 3 * service.IDS_AT_ONCE
    assert all(re.fullmatch("x-[0-9a-f]{32}", each) for each in found)
    service.new_id("x")
    code = (
        "import os; from aserve.server.service import new_id; new_id('x'); reading, writing = os.pipe()\n"
        "if os.fork() == 0: os.write(writing, new_id('x').encode()); os._exit(0)\n"
        "os.wait(); assert os.read(reading, 99).decode() != new_id('x')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("host", ["h", "a.b:80", "", "[::1", "é".encode().decode("latin-1"), "x" * 300])
async def test_routing_does_not_depend_on_the_host(port: int, host: str) -> None:
    answer = await raw(port, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


async def test_a_request_without_a_host_is_routed(port: int) -> None:
    assert (await raw(port, "GET /v1/models HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 200")


def test_headers_are_found_as_werkzeug_finds_them() -> None:
    pairs = [("Host", "h"), ("X-Number", "12"), ("X-Word", "twelve"), ("x-number", "13")]
    ours, theirs = RequestHeaders(pairs), Headers(pairs)
    for name in ("host", "HOST", "x-Number", "X-word", "x-worD", "missing", ""):
        assert ours.get(name) == theirs.get(name)
        assert ours.get(name, "other") == theirs.get(name, "other")
        assert ours.get(name, type=int) == theirs.get(name, type=int)
        assert ours.get(name, -1, int) == theirs.get(name, -1, int)
        assert ours.getlist(name) == theirs.getlist(name)
    ours.add("Later", "1")
    assert ours.get("LATER") == "1"


async def test_a_view_sees_the_request_as_it_was_sent(engine: FakeEngine) -> None:
    app = make_app(engine)

    @app.post("/look")
    async def look() -> dict[str, Any]:
        body = (await asked.get_data()).decode()
        text = await asked.get_data(as_text=True)
        shown = {"body": body, "text": text, "q": asked.args["q"], "client": asked.remote_addr}
        return shown | {"one": asked.headers["X-One"], "all": asked.headers.getlist("x-one")}

    async with running(app) as port:
        request = "POST /look?q=a%20b HTTP/1.1\r\nHost: h\r\nConnection: close\r\nX-One: 1\r\nx-one: \xe9\r\n"
        answer = await raw(port, request + "Content-Length: 4\r\n\r\nbody")
    assert answer.endswith(
        '{"body":"body","text":"body","q":"a b","client":"127.0.0.1","one":"1","all":["1","é"]}'.encode()
    )
