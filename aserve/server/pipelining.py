"""Keeps an HTTP/1.1 connection readable while a request is being answered.

Hypercorn stops reading a connection on which a second request arrived before the first was answered.
It then cannot see the client leave, and a request that writes nothing until it is done is computed to
its end for nobody. Here the reader is never parked: bytes of pipelined requests stay in h11's buffer
until the first answer is out, and a client that leaves is seen at once.

Checked by tests against a real server, since it relies on ``can_read``, the event Hypercorn's
protocol waits on when h11 reports PAUSED.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import h11
import hypercorn.protocol as hypercorn_protocol
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Closed, RawData, Updated
from hypercorn.protocol.events import Request, Response
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol

from aserve.server.exchange import Exchange
from aserve.server.framing import FramingConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hypercorn.events import Event
    from hypercorn.protocol.events import Event as StreamEvent

HEADER_SECONDS = 20.0
"""Seconds a request's head may take from its first byte to its last."""

ENOUGH = 32 * 1024
"""Bytes on their way to the socket with which an answer waits for its client to read."""

MAX_PIPELINED = 256 * 1024
"""Bytes a client may send ahead of the answer it waits for; more closes the connection."""

LINGER_SECONDS = 30.0
"""Seconds the last bytes of a connection that is to be closed may take to leave for a client that is slow."""


MAX_UNREAD = 64 << 20
UNREAD_SECONDS = 5.0
"""What a client may go on to send, and for how long, of a body that has been answered before its end.

Closing the connection at once would reset it, and the client might never see the answer."""


class _Paused(Exception):
    """h11 has a further request buffered and cannot go on before the present one is answered."""


class _NeverPark:
    """Stands in for ``can_read``: raises where Hypercorn would wait."""

    def __init__(self, resume: Any) -> None:
        self._resume = resume

    async def clear(self) -> None:
        return None

    async def wait(self) -> None:
        raise _Paused

    async def set(self) -> None:
        self._resume()

    def is_set(self) -> bool:
        return True


refusals: list[Callable[[int], None]] = []
"""Called with the status of every request that is refused because it is no HTTP."""


class ReadingH11Protocol(H11Protocol):
    """Hypercorn's HTTP/1.1 protocol that goes on reading behind a pipelined request.

    It also speaks HTTP/1.1 only: a request to switch to HTTP/2 is answered as what it else is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connection = FramingConnection(
            h11.SERVER, max_incomplete_event_size=self.config.h11_max_incomplete_size
        )
        self.can_read = _NeverPark(self._resume)
        self._paused = False
        self._buffered = 0
        self._order = asyncio.Lock()
        self._deadline: asyncio.TimerHandle | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._cut: asyncio.TimerHandle | None = None
        self._ended = False
        self._unread: int | None = None
        self._held = b""
        self.to_server = self.send
        self.send = self._pass_on

    async def initiate(self) -> None:
        table.add(self)
        task = asyncio.current_task()
        if task is not None:  # the connection's own
            task.add_done_callback(self._over)
        await super().initiate()

    def _over(self, _: object) -> None:
        """The connection has ended, one way or another."""
        table.remove(self)
        self._stop_clock()
        self._forget()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._cut is not None:
            self._cut.cancel()

    async def _pass_on(self, event: Event) -> None:
        """Hands an event to the server, which need not hear of every request's begin and end.

        It makes a task for the time a connection may be idle, and stops it again, each time.
        """
        if not isinstance(event, Updated):
            if isinstance(event, Closed):
                if self._hears_out():
                    return
                self._linger(LINGER_SECONDS)
            await self.to_server(event)
        elif event.idle:
            keep = self.config.keep_alive_timeout
            self._idle = asyncio.get_running_loop().call_later(keep, self.drop)
        elif self._idle is not None:
            self._idle.cancel()
            self._idle = None
        elif self._watcher is None:
            await self.to_server(event)
            self._watcher = asyncio.create_task(self._watch())

    def _hears_out(self) -> bool:
        """Whether the client is to be given time to read its answer before the connection is closed."""
        transport = self.transport
        if (
            self._ended
            or self._unread is not None
            or self.connection.our_state not in (h11.DONE, h11.MUST_CLOSE)
            or self.connection.their_state is not h11.SEND_BODY
            or transport is None
            or transport.is_closing()
            or not transport.can_write_eof()
        ):
            return False
        self._unread = 0
        transport.write_eof()
        self._linger(UNREAD_SECONDS, whatever=True)
        return True

    async def _watch(self) -> None:
        """Ends the connection with the server, at once unless a request is being answered on it."""
        await self.context.terminated.wait()
        if self._idle is not None:
            await self._drop()
        else:
            self._linger(self.config.graceful_timeout, whatever=True)

    def _linger(self, seconds: float, *, whatever: bool = False) -> None:
        """Cuts the connection in so many seconds if it has something to send, or ``whatever`` it has.

        Closing it waits until everything is sent, which is for ever where the client does not read.
        """
        transport = self.transport
        if transport is None or not (whatever or transport.get_write_buffer_size()):
            return
        if self._cut is not None:
            self._cut.cancel()
        self._cut = asyncio.get_running_loop().call_later(seconds, transport.abort)

    async def handle(self, event: Event) -> None:
        if not isinstance(event, RawData):
            self._ended = True
            table.remove(self)
            self._stop_clock()
            self._forget()
            self._linger(LINGER_SECONDS)
            if (
                self._watcher is None
            ):  # no request has come, and the server would wait for one as long as ever
                await self.to_server(Updated(idle=False))
            await super().handle(event)
            return
        if self._unread is not None:
            self._unread += len(event.data)
            if self._unread > MAX_UNREAD and self.transport is not None:
                self.transport.abort()
            return
        if self._paused:
            self._buffered += len(event.data)
            if self._buffered > MAX_PIPELINED:
                await super().handle(Closed())  # first: closing the socket waits for a client that reads
                await self.send(Closed())
                return
        self.connection.receive_data(event.data)
        if not self._paused:
            await self._handle_events()
            if self._deadline is not None:
                if self.connection.their_state is not h11.IDLE:
                    self._stop_clock()
            elif self.connection.their_state is h11.IDLE and event.data and self.stream is None:
                # Part of a head has come. Its rest must not take for ever, however steadily it trickles.
                self._deadline = asyncio.get_running_loop().call_later(HEADER_SECONDS, self.drop)

    async def _handle_events(self) -> None:
        # Reader and resumption take turns: body parts must reach the application in order.
        async with self._order:
            try:
                await super()._handle_events()
            except _Paused:
                self._paused = True
                # What is there already counts as well: a client might send as much ahead of every answer.
                self._buffered = len(self.connection.trailing_data[0])
            except h11.RemoteProtocolError as error:
                await self._send_error_response(error.error_status_hint)
                await self.send(Closed())

    def _resume(self) -> None:
        """The answer is out: takes up what was buffered meanwhile, in a task of its own.

        Not in the calling task, which is that of the answered request and would be held by the body
        of the next one.
        """
        if self._paused and self.connection.their_state is h11.IDLE:
            self._paused = False
            self.task_group.spawn(self._handle_events)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _forget(self) -> None:
        """Stops waiting for a further request."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def drop(self) -> None:
        """Closes the connection, on which no request is being answered."""
        self.task_group.spawn(self._drop)

    async def _drop(self) -> None:
        await self.handle(Closed())
        await self.send(Closed())

    async def _send_error_response(self, status_code: int) -> None:
        # No application sees such a request: it would be missing among the errors that are counted.
        for count in refusals:
            count(status_code)
        await super()._send_error_response(status_code)

    async def _create_stream(self, request: h11.Request) -> None:
        if self._ended:  # what was buffered is taken up just when the client leaves: nobody would tell it
            return
        table.busy(self)
        self._stop_clock()
        self._held = b""  # of an answer that failed before its end was sent
        headers = list(request.headers)
        if b"upgrade" in [name for name, _ in headers]:  # of which a WebSocket may come
            await super()._create_stream(request)
            return
        self.stream = Exchange(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=request.headers.raw_items() if self.config.h11_pass_raw_headers else headers,
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1
        await self.context.mark_request()

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Response) and isinstance(self.connection, FramingConnection):
            event = self.connection.framed(event)
        await super().stream_send(event)

    def hold(self, data: bytes) -> None:
        """Has ``data`` sent with, and before, what h11 sends next, which must be soon."""
        self._held += data

    async def _send_h11_event(self, event: Any) -> None:
        transport = self.transport
        held, self._held = self._held, b""
        if transport is None or transport.is_closing() or transport.get_write_buffer_size() > ENOUGH:
            if held:
                await self.send(RawData(held))
            await super()._send_h11_event(event)
            return
        # It would not have to wait for the client: the locks and the waiting can be left out.
        data = None
        try:
            data = self.connection.send(event)
        except h11.LocalProtocolError:
            if self.connection.their_state != h11.ERROR:
                raise
        finally:
            if held or data:
                transport.write(held + (data or b""))

    @property
    def transport(self) -> asyncio.WriteTransport | None:
        """What writes to the socket, if the server is the one that is known."""
        server = getattr(self.to_server, "__self__", None)
        return server.writer.transport if isinstance(server, TCPServer) else None

    async def _maybe_recycle(self) -> None:
        table.idle(self)
        await super()._maybe_recycle()

    async def _check_protocol(self, event: h11.Request) -> None:
        # A proxy may have taken the body's length from the one, and h11 takes it from the other.
        names = {name for name, _ in event.headers}
        if b"transfer-encoding" in names and b"content-length" in names:
            raise h11.RemoteProtocolError("both Transfer-Encoding and Content-Length", error_status_hint=400)


class ConnectionTable:
    """The open connections. With ``most`` of them open, a new one costs the one that is idle the longest.

    So connections that are held open and ask for nothing keep nobody out.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._idle: dict[ReadingH11Protocol, None] = {}  # in the order they became so
        self._busy: set[ReadingH11Protocol] = set()

    def __len__(self) -> int:
        return len(self._idle) + len(self._busy)

    def __iter__(self) -> Iterator[ReadingH11Protocol]:
        return iter((*self._idle, *self._busy))

    def add(self, connection: ReadingH11Protocol) -> None:
        if len(self) >= self.most:
            # Where all are busy it is the newcomer's own.
            oldest = next(iter(self._idle), connection)
            self._idle.pop(oldest, None)
            oldest.drop()
            if oldest is connection:
                return
        self._idle[connection] = None

    def busy(self, connection: ReadingH11Protocol) -> None:
        self._idle.pop(connection, None)
        self._busy.add(connection)

    def idle(self, connection: ReadingH11Protocol) -> None:
        if connection in self._busy:
            self._busy.remove(connection)
            self._idle[connection] = None

    def remove(self, connection: ReadingH11Protocol) -> None:
        self._idle.pop(connection, None)
        self._busy.discard(connection)


SPARE_FILES = 128
"""Files that connections leave for everything else."""


def raise_file_limit() -> int:
    """Takes as many open files as the process may have; returns how many of them connections may take."""
    try:
        import resource
    except ImportError:  # not a Unix
        return 4096
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max(64, min(soft, 1 << 16) - SPARE_FILES) if soft > 0 else 1 << 16


table = ConnectionTable(1 << 16)


def install() -> None:
    """Makes Hypercorn use :class:`ReadingH11Protocol` for the connections it accepts from now on.

    Also raises the process' limit of open files, which bounds the number of connections.
    """
    table.most = raise_file_limit()
    hypercorn_protocol.H11Protocol = ReadingH11Protocol  # type: ignore[attr-defined]
