"""Streamed events on the short way: from the engine's step to the socket without a task in between.

A step changes many streams. One callback of the loop, after the next step has been launched, formats
what is new in each and hands it to the connection's transport, already framed as HTTP/1.1 chunks.
Everything that is not the usual case (a client that reads too slowly, a connection that is closing, the
end, a failure) is left to the stream's task, which sends through sse-starlette and Hypercorn with their
waiting and their timeouts.

The transport is reached through Hypercorn's objects behind ``send``; where they are not the expected
ones (a middleware around the application, HTTP/1.0, a test client) there is no short way, and nothing
else changes. Checked by tests against a real server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Protocol

from aserve.server.errors import error_event
from aserve.server.exchange import Exchange
from aserve.server.pipelining import ReadingH11Protocol
from aserve.server.sse import DONE

if TYPE_CHECKING:
    from aserve.engine.stream import OutputStream
    from aserve.messages.outputs import RequestOutput
    from aserve.server.openai.generation import Streams

logger = logging.getLogger(__name__)


class Courier:
    """Runs what was asked for during a step in one callback of the running loop."""

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []

    def call(self, function: Callable[[], None]) -> None:
        if not self._due:
            asyncio.get_running_loop().call_soon(self._run)
        self._due.append(function)

    def _run(self) -> None:
        due, self._due = self._due, []
        for function in due:
            try:
                function()
            except Exception:  # one stream's failure is not its neighbours'
                logger.exception("a stream's output could not be handed on")


class ChunkWriter:
    """Writes chunks of a chunked HTTP/1.1 body straight to a transport."""

    __slots__ = ("_hold", "_transport")

    def __init__(self, transport: asyncio.WriteTransport, hold: Callable[[bytes], None]) -> None:
        self._transport = transport
        self._hold = hold

    @property
    def clear(self) -> bool:
        """Whether the socket has taken everything so far and is open."""
        return not (self._transport.get_write_buffer_size() or self._transport.is_closing())

    def write(self, data: bytes) -> bool:
        """Writes ``data``, which is not empty; False, and nothing written, if the way is not clear."""
        if not self.clear:
            return False
        self._transport.write(_chunk(data))
        return True

    def write_last(self, data: bytes) -> bool:
        """The same for what nothing but the body's end follows, at once: they leave together."""
        if not self.clear:
            return False
        self._hold(_chunk(data))
        return True


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def writer_behind(send: Any, scope: Any) -> ChunkWriter | None:
    """A writer to the connection that the ASGI callable ``send`` belongs to, if that is possible."""
    if scope.get("http_version") != "1.1" or scope.get("method") == "HEAD":
        return None  # h11 frames such bodies otherwise, or not at all
    stream = exchange_behind(send)
    protocol = getattr(stream.send, "__self__", None) if stream is not None else None
    if not isinstance(protocol, ReadingH11Protocol) or protocol.transport is None:
        return None
    return ChunkWriter(protocol.transport, protocol.hold)


def exchange_behind(send: Any) -> Exchange | None:
    """The exchange that the ASGI callable ``send`` belongs to, if it is one of ours."""
    stream = getattr(send, "__self__", None)
    return stream if isinstance(stream, Exchange) and send == stream.app_send else None


class Call(Protocol):
    """Turns the outputs of one call into the bytes of its events."""

    def events_of(self, prompt_index: int, output: RequestOutput) -> bytes:
        """The events of one output, b"" if there is nothing to tell."""

    def ending(self) -> bytes:
        """The events after the last output, without the end of the stream."""


class LiveEvents:
    """The events of a call as its outputs come. Read once, by ``plain`` or by ``direct``.

    failure: the event that tells of an error. done: what ends every stream.
    """

    def __init__(
        self,
        streams: Streams,
        call: Call,
        courier: Courier,
        *,
        failure: Callable[[BaseException], bytes] = error_event,
        done: bytes = DONE,
    ) -> None:
        self._tell, self._done = failure, done
        self._streams = streams
        self._call = call
        self._courier = courier
        self._writer: ChunkWriter | None = None
        self._stream: OutputStream | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._failure: Exception | None = None

    def give_up(self) -> None:
        """Aborts the call of a client that has not read for too long."""
        self._streams.close("slow_client")

    async def plain(self) -> AsyncIterator[bytes]:
        """Every event, to be sent by whoever iterates."""
        try:
            async for prompt_index, output in self._streams:
                data = self._call.events_of(prompt_index, output)
                if data:
                    yield data
            last = self._call.ending()
        except Exception as error:  # after the head, every failure is an event
            self._streams.close("error")
            last = self._tell(error)
        finally:
            self._streams.close()
        if last + self._done:
            yield last + self._done

    async def direct(self, writer: ChunkWriter) -> AsyncIterator[bytes]:
        """Only the events that ``writer`` could not take; it has the others already."""
        stream = self._streams.only
        if stream is None:
            async for data in self.plain():
                if not writer.write(data):
                    yield data
            return
        self._writer, self._stream = writer, stream
        stream.listen(self._changed)
        last = b""
        try:
            while True:
                if stream.quiet:
                    await self._wait()
                if self._failure is not None:
                    raise self._failure
                try:
                    output = await anext(stream)
                except StopAsyncIteration:
                    break
                data = self._call.events_of(0, output)
                if output.finished:  # what ends the stream goes with it
                    last = data
                    break
                if data and not writer.write(data):
                    yield data
            last += self._call.ending()
        except Exception as error:  # after the head, every failure is an event
            self._streams.close("error")
            last += self._tell(error)
        finally:
            stream.listen(None)
            self._streams.close()
        last += self._done
        if last and not writer.write_last(last):
            yield last

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _changed(self) -> None:
        # Called in the middle of the engine's step: not the time to format anything.
        self._courier.call(self._deliver)

    def _deliver(self) -> None:
        stream, writer, waiter = self._stream, self._writer, self._waiter
        if stream is None or writer is None or waiter is None or waiter.done():
            return  # the task is awake and will look for itself
        if stream.ended or not writer.clear:
            waiter.set_result(None)
            return
        try:
            self._hand_over(stream, writer)
        except Exception as error:
            self._failure = error
            waiter.set_result(None)

    def _hand_over(self, stream: OutputStream, writer: ChunkWriter) -> None:
        output = stream.take()
        if output is None:
            return
        data = self._call.events_of(0, output)
        if data:
            writer.write(data)
