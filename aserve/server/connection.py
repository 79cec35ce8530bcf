"""How a Quart route answers with an sse-starlette stream, and how every exchange ends."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import anyio
from quart import Response
from quart.asgi import ASGIHTTPConnection
from quart.utils import encode_headers
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.event import ensure_bytes
from sse_starlette.sse import SendTimeoutError
from werkzeug.datastructures import Headers

from aserve.server.direct import ChunkWriter, LiveEvents, exchange_behind, writer_behind
from aserve.server.request import RequestHeaders

if TYPE_CHECKING:
    from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, HTTPScope
    from quart import Quart, Request
    from quart.typing import ResponseTypes

    from aserve.server.exchange import Exchange

PING_SECONDS = 15.0
SEND_TIMEOUT = 30.0
"""Seconds one event may wait for a client that does not read before its request is aborted."""

CANCEL_SECONDS = 0.05
"""Seconds between two attempts to end the handler of a client that has left."""

_STREAM_HEADERS = [
    ("Content-Type", "text/event-stream; charset=utf-8"),
    ("Cache-Control", "no-cache"),
    ("X-Accel-Buffering", "no"),
]

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
        super().__init__(status=200, headers=Headers(_STREAM_HEADERS))
        self.timeout = None  # Quart's RESPONSE_TIMEOUT (60 s) would cut a longer stream without a trace.
        self.events = events
        self.on_close = on_close
        self.ping = ping
        self.send_timeout = send_timeout

    async def send_to(self, scope: Any, send: Any, writer: ChunkWriter | None = None) -> None:
        """Sends it; events that ``writer`` can take go straight to it."""
        events = self.events
        if not isinstance(events, LiveEvents):
            await self.source(events, self.on_close)(scope, anyio.sleep_forever, send)
        elif writer is None or scope["method"] == "HEAD":
            await self.source(events.plain(), events.give_up)(scope, anyio.sleep_forever, send)
        else:
            await self._send_live(events, send, writer)

    async def _send_live(self, live: LiveEvents, send: Any, writer: ChunkWriter) -> None:
        """sse-starlette comes in where there is something to wait for: a silent engine, a slow client."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        source: _Source | None = None
        pings: asyncio.Task[None] | None = None

        def begin() -> None:
            nonlocal pings
            pings = asyncio.create_task(self.source(live.plain(), live.give_up).pings(send))
            pings.add_done_callback(lambda pings: None if pings.cancelled() else task.cancel())

        timer = asyncio.get_running_loop().call_later(self.ping, begin) if self.ping > 0 else None
        try:
            head = encode_headers(self.headers)
            await send({"type": "http.response.start", "status": self.status_code, "headers": head})
            async for data in live.direct(writer):
                source = source or self.source(live.plain(), live.give_up)
                await source.send_event(send, data)
            if pings is not None:
                pings.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if pings is None or not pings.done() or task.uncancel():
                raise
            pings.result()  # a ping that nobody read for too long has ended the stream
        finally:
            if timer is not None:
                timer.cancel()
            if pings is not None:
                pings.cancel()

    def source(self, events: AsyncIterable[bytes], on_slow: Callable[[], None]) -> _Source:
        """The ASGI application that sends ``events``; ``on_slow`` is called if the client does not read."""
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

    async def send_event(self, send: Any, data: bytes) -> None:
        """Sends one event to a client that may take its time."""
        await self._send_with_timeout(send, {"type": "http.response.body", "body": data, "more_body": True})

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
            pings = loop.create_task(self.pings(send))
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

    async def pings(self, send: Any) -> None:
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
        exchange = exchange_behind(send)
        exchanges.begin()
        try:
            if exchange is not None and receive == exchange.receive:
                await self._handle_here(exchange, request, send)
            else:
                await self._handle_beside_reader(request, receive, send)
        finally:
            exchanges.end()

    def _create_request_from_scope(self, send: ASGISendCallable) -> Request:
        scope, config = self.scope, self.app.config
        headers = [("Remote-Addr", (scope.get("client") or ["<local>"])[0])]
        headers += [
            (name.decode("latin-1").title(), value.decode("latin-1")) for name, value in scope["headers"]
        ]
        found = RequestHeaders(headers)
        if scope["http_version"] < "1.1":
            found.setdefault("Host", config["SERVER_NAME"] or "")
        return self.app.request_class(
            scope["method"],
            scope["scheme"],
            scope["path"],
            scope["query_string"],
            found,
            scope["root_path"],
            scope["http_version"],
            scope,
            max_content_length=config["MAX_CONTENT_LENGTH"],
            body_timeout=config["BODY_TIMEOUT"],
            send_push_promise=partial(self._send_push_promise, send),
        )

    async def _handle_here(self, exchange: Exchange, request: Request, send: ASGISendCallable) -> None:
        """Handles a request whose messages come as calls."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        loop = asyncio.get_running_loop()
        cancelled = 0

        def take(message: Any) -> None:
            if message["type"] == "http.request":
                request.body.append(message["body"])
                if not message["more_body"]:
                    request.body.set_complete()
            elif not (cancelled or exchange.answered):
                leave()

        def leave() -> None:
            # More than once: before Python 3.12 `asyncio.wait_for` loses a cancellation that comes together
            # with what is waited for, such as the end of the body.
            nonlocal cancelled
            if not done:
                cancelled += 1
                task.cancel()
                loop.call_later(CANCEL_SECONDS, leave)

        done = False
        exchange.hand_to(take)
        try:
            await self.handle_request(request, send)
        except asyncio.CancelledError:
            others = task.cancelling()
            for _ in range(cancelled):
                others = task.uncancel()
            if others or not cancelled:
                raise
        finally:
            done = True

    async def _handle_beside_reader(
        self, request: Request, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        """The same with a task that reads ``receive``."""
        with anyio.CancelScope() as scope:
            # The only reader of `receive`: the server delivers `http.disconnect` once.
            reader = asyncio.create_task(self.handle_messages(request, receive))
            reader.add_done_callback(lambda _: scope.cancel())
            try:
                await self.handle_request(request, send)
            finally:
                reader.cancel()

    async def _send_response(self, send: ASGISendCallable, response: ResponseTypes) -> None:
        if isinstance(response, EventStream):
            # A disconnect reaches the stream as cancellation, so it gets a `receive` that says nothing.
            writer = None if "Content-Length" in response.headers else writer_behind(send, self.scope)
            try:
                await response.send_to(self.scope, send, writer)
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
