"""How a Quart route answers with an sse-starlette stream, and how every exchange ends."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
from quart import Response
from quart.asgi import ASGIHTTPConnection
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.event import ensure_bytes
from sse_starlette.sse import SendTimeoutError

from aserve.server.direct import ChunkWriter, LiveEvents, writer_behind

if TYPE_CHECKING:
    from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, HTTPScope
    from quart import Quart
    from quart.typing import ResponseTypes

PING_SECONDS = 15.0
SEND_TIMEOUT = 30.0
"""Seconds one event may wait for a client that does not read before its request is aborted."""

_SLASHES = re.compile(r"/{2,}")


def _ping() -> ServerSentEvent:
    # A fixed text: the default one holds the time. The separator must be "\n": clients that split
    # events at "\n\n" would otherwise glue the ping to the next event.
    return ServerSentEvent(comment="ping", sep="\n")


class EventStream(Response):
    """A Quart response whose body is written by sse-starlette.

    It is an ordinary ``Response`` until the last moment, so ``after_request`` hooks (CORS, request
    ids) see and may change its headers.

    events: yields whole events as bytes, or may be written straight to the connection.
    on_close: called once when the exchange is over, however it ended; must not block. The ``finally``
        of ``events`` is not enough: a generator that never started has none to run.
    ping: seconds of silence before a comment line is sent.
    send_timeout: seconds one event may wait for the client to read.
    """

    default_mimetype = "text/event-stream"
    automatically_set_content_length = False

    def __init__(
        self,
        events: AsyncIterable[bytes] | LiveEvents,
        *,
        on_close: Callable[[], None] = lambda: None,
        ping: float = PING_SECONDS,
        send_timeout: float | None = SEND_TIMEOUT,
    ) -> None:
        super().__init__(status=200, content_type="text/event-stream; charset=utf-8")
        self.timeout = None  # Quart's RESPONSE_TIMEOUT (60 s) would cut a longer stream without a trace.
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"
        self.events = events
        self.on_close = on_close
        self.ping = ping
        self.send_timeout = send_timeout

    def source(self, writer: ChunkWriter | None = None) -> EventSourceResponse:
        """The ASGI application that sends it; what ``writer`` can take goes past it."""
        events = self.events
        on_slow: Callable[[], None] = self.on_close
        if isinstance(events, LiveEvents):
            on_slow = events.give_up
            events = events.plain() if writer is None else events.direct(writer)
        return _Source(
            on_slow,
            events,
            status_code=self.status_code,
            headers=dict(self.headers),
            ping=self.ping,
            ping_message_factory=_ping,
            sep="\n",
            send_timeout=self.send_timeout,
        )


class _Source(EventSourceResponse):
    """sse-starlette's response, with tasks only for what can happen here.

    It watches for uvicorn's shutdown and for a disconnect in a task each. Here the engine ends streams at
    shutdown, and a disconnect arrives as cancellation; a task for the ping is made when one is due.
    """

    def __init__(self, on_slow: Callable[[], None], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._on_slow = on_slow

    async def _send_with_timeout(self, send: Any, message: Any) -> None:
        try:
            await super()._send_with_timeout(send, message)
        except SendTimeoutError:
            self._on_slow()
            raise

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "HEAD":
            await super().__call__(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None
        pings: asyncio.Task[None] | None = None

        def begin() -> None:
            nonlocal pings
            pings = loop.create_task(self._pings(send))
            pings.add_done_callback(lambda _: stream.cancel())

        try:
            with anyio.CancelScope() as stream:
                if self.ping_interval > 0:
                    timer = loop.call_later(self.ping_interval, begin)
                await self._stream_response(send)
            if pings is not None and pings.done():
                pings.result()  # a ping that nobody read for too long has ended the stream
        finally:
            if timer is not None:
                timer.cancel()
            if pings is not None:
                pings.cancel()

    async def _pings(self, send: Any) -> None:
        message = {"type": "http.response.body", "body": ensure_bytes(_ping(), "\n"), "more_body": True}
        async with self._send_lock:
            if self.active:
                await self._send_with_timeout(send, message)
        await self._ping(send)


class Connection(ASGIHTTPConnection):
    """One HTTP exchange, run in the server's own task.

    Quart runs the handler in a task of its own that a cancelled connection leaves behind. Here the
    handler is the connection: whatever ends the connection (disconnect, shutdown) unwinds the
    handler, its generator and, through them, the engine requests.
    """

    def __init__(self, app: Quart, scope: HTTPScope) -> None:
        root = scope.get("root_path") or app.config["APPLICATION_ROOT_PATH"]
        path = route_path(scope["path"], root)
        super().__init__(app, {**scope, "path": path, "root_path": ""})

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        exchanges: Exchanges = self.app.extensions["exchanges"]
        request = self._create_request_from_scope(send)
        exchanges.begin()
        with anyio.CancelScope() as scope:
            # The only reader of `receive`: the server delivers `http.disconnect` once.
            reader = asyncio.create_task(self.handle_messages(request, receive))
            reader.add_done_callback(lambda _: scope.cancel())
            try:
                await self.handle_request(request, send)
            finally:
                exchanges.end()
                reader.cancel()

    async def _send_response(self, send: ASGISendCallable, response: ResponseTypes) -> None:
        if isinstance(response, EventStream):
            # A disconnect reaches the stream as cancellation, so it gets a `receive` that says nothing.
            writer = None if "Content-Length" in response.headers else writer_behind(send, self.scope)
            try:
                await response.source(writer)(self.scope, anyio.sleep_forever, send)  # type: ignore[arg-type]
            finally:
                response.on_close()
        else:
            await super()._send_response(send, response)


def route_path(path: str, root: str) -> str:
    """The path that is routed: always absolute, without doubled slashes and without ``root``.

    One form is made of the absolute URL, the doubled slashes and the prefixed path before anything
    looks at it, so routing and the API key cannot disagree about what was asked for.
    """
    if not path.startswith("/"):
        path = "/" + _authority_free(path).lstrip("/")
    path = _SLASHES.sub("/", path)
    if root and (path == root or path.startswith(root + "/")):
        path = path[len(root) :] or "/"
    return path


def _authority_free(target: str) -> str:
    try:
        return urlsplit(target).path
    except ValueError:  # an unbalanced bracket in the host part
        return " "  # routed to nothing


class Exchanges:
    """Counts the exchanges whose answer is not fully sent."""

    def __init__(self) -> None:
        self.open = 0
        self._none = asyncio.Event()
        self._none.set()

    def begin(self) -> None:
        self.open += 1
        self._none.clear()

    def end(self) -> None:
        self.open -= 1
        if not self.open:
            self._none.set()

    async def wait_for_none(self) -> None:
        await self._none.wait()


async def all_answered(app: Quart) -> None:
    """Returns once no exchange is open."""
    await app.extensions["exchanges"].wait_for_none()
