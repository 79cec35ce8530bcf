"""One HTTP/1.1 request of a connection, handed to the application without a queue in between.

Hypercorn puts what arrives of a body, and later the news that the client has left, into a queue that a
task of the application has to wait on. An application that knows this class gives it a function instead,
which is called with every message as it comes. Any other application finds the usual ``receive``.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from hypercorn.protocol.events import Body, EndBody, Request, StreamClosed
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.utils import valid_server_name

if TYPE_CHECKING:
    from hypercorn.protocol.events import Event

Take = Callable[[Any], None]
"""Takes an ASGI message at once; does not raise."""


class Exchange(HTTPStream):
    """Hypercorn's stream of events of one request, and the application's way to them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._messages: deque[Any] = deque()
        self._take: Take | None = None
        self._changed: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    # ---------------------------------------------------------------- the application's side

    async def receive(self) -> Any:
        """The next message, as ASGI has it."""
        while not self._messages:
            self._changed = asyncio.get_running_loop().create_future()
            await self._changed
        message = self._messages.popleft()
        _wake(self._room)
        return message

    def hand_to(self, take: Take) -> None:
        """Has ``take`` called with the messages that are there, and with every further one as it comes."""
        self._take = take
        while self._messages:
            take(self._messages.popleft())
        _wake(self._room)

    @property
    def answered(self) -> bool:
        """Whether the whole answer has been sent."""
        return self.state == ASGIHTTPState.CLOSED

    # ---------------------------------------------------------------- the connection's side

    async def handle(self, event: Event) -> None:
        if self.closed:
            return
        if isinstance(event, Request):
            await self._begin(event)
        elif isinstance(event, Body):
            await self._put({"type": "http.request", "body": bytes(event.data), "more_body": True})
        elif isinstance(event, EndBody):
            await self._put({"type": "http.request", "body": b"", "more_body": False})
        elif isinstance(event, StreamClosed):
            self.closed = True
            if self.state != ASGIHTTPState.CLOSED:
                seconds = time() - self.start_time
                await self.config.log.access(self.scope, None, seconds)  # type: ignore[arg-type]
            self._deliver({"type": "http.disconnect"})
            _wake(self._room)

    async def _begin(self, request: Request) -> None:
        self.start_time = time()
        path, _, query_string = request.raw_path.partition(b"?")
        self.scope = {
            "type": "http",
            "http_version": request.http_version,
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "method": request.method,
            "scheme": self.scheme,
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query_string,
            "root_path": self.config.root_path,
            "headers": request.headers,
            "client": self.client,
            "server": self.server,
            "state": request.state.copy(),  # type: ignore[typeddict-item]
            "extensions": {},
        }
        if valid_server_name(self.config, request):
            self.task_group.spawn(self._run)
        else:
            await self._send_error_response(404)
            self.closed = True

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()

        def spawn(function: Any, *args: Any) -> Any:
            return loop.run_in_executor(None, function, *args)

        def call_soon(function: Any, *args: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(function(*args), loop).result()

        try:
            await self.app(self.scope, self.receive, self.app_send, spawn, call_soon)
        except asyncio.CancelledError:
            raise
        except Exception:
            await self.config.log.exception("Error in ASGI Framework")
        finally:
            await self.app_send(None)

    async def _put(self, message: Any) -> None:
        """Delivers part of a body once there is room for it, so that a body nobody reads waits outside."""
        while self._take is None and len(self._messages) >= self.config.max_app_queue_size:
            self._room = asyncio.get_running_loop().create_future()
            await self._room
            if self.closed:
                return
        self._deliver(message)

    def _deliver(self, message: Any) -> None:
        if self._take is not None:
            self._take(message)
        else:
            self._messages.append(message)
            _wake(self._changed)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
