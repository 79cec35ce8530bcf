from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import orjson
import pytest
from hypercorn.asyncio import serve
from hypercorn.config import Config
from quart import Quart

from aserve.config.server import ServerArgs
from aserve.server import pipelining
from aserve.server.app import create_app
from aserve.server.serve import listen
from tests.server.fake_engine import FakeEngine

pipelining.install()


def server_args(**values: Any) -> ServerArgs:
    args = ServerArgs(**values)
    args.check()
    return args


def make_app(engine: FakeEngine, **values: Any) -> Quart:
    extra = {key: values.pop(key) for key in ("on_fatal",) if key in values}
    return create_app(None, server_args(**values), engine, **extra)  # type: ignore[arg-type]


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def app(engine: FakeEngine) -> AsyncIterator[Quart]:
    app = make_app(engine)
    async with app.test_app():
        yield app


@pytest.fixture
def client(app: Quart) -> Any:
    return app.test_client()


@asynccontextmanager
async def running(app: Quart) -> AsyncIterator[int]:
    """The app behind a real Hypercorn on a free port, which is yielded."""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.graceful_timeout = 1.0
    config.errorlog = None
    stop = asyncio.Event()
    task = asyncio.create_task(serve(app, config, shutdown_trigger=stop.wait))
    try:
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionError:
                await asyncio.sleep(0.01)
            else:
                writer.close()
                break
        yield port
    finally:
        stop.set()
        await task


@pytest.fixture
async def port(engine: FakeEngine) -> AsyncIterator[int]:
    async with running(make_app(engine)) as found:
        yield found


Serve = Callable[..., Awaitable[int]]


@pytest.fixture
async def serving(engine: FakeEngine) -> AsyncIterator[Serve]:
    """``await serving(api_key=[...])`` runs an app with those server arguments; gives its port."""
    async with AsyncExitStack() as stack:

        async def start(**values: Any) -> int:
            return await stack.enter_async_context(running(make_app(engine, **values)))

        yield start


async def until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits until ``holds()``; fails after ``seconds``."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(0.005)


def events(data: bytes) -> list[Any]:
    """The payloads of a stream's events; ``[DONE]`` stays a string."""
    found = []
    for event in data.decode().split("\n\n"):
        if event.startswith("data: "):
            payload = event.removeprefix("data: ")
            found.append(payload if payload == "[DONE]" else orjson.loads(payload))
    return found


async def raw(port: int, request: str, *, read: bool = True) -> bytes:
    """Sends bytes as they are and reads the answer until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request.encode("latin-1"))
        await writer.drain()
        return await asyncio.wait_for(reader.read(), 5) if read else b""
    finally:
        writer.close()


def post(path: str, body: dict[str, Any], *headers: str) -> str:
    """An HTTP/1.1 POST as text."""
    data = orjson.dumps(body).decode()
    lines = [f"POST {path} HTTP/1.1", "Host: h", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join(lines) + "\r\n\r\n" + data
