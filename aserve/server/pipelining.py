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
from hypercorn.events import Closed, RawData
from hypercorn.protocol.h11 import H11Protocol

if TYPE_CHECKING:
    from hypercorn.events import Event

MAX_PIPELINED = 256 * 1024
"""Bytes a client may send ahead of the answer it waits for; more closes the connection."""


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


class ReadingH11Protocol(H11Protocol):
    """Hypercorn's HTTP/1.1 protocol that goes on reading behind a pipelined request.

    It also speaks HTTP/1.1 only: a request to switch to HTTP/2 is answered as what it else is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.can_read = _NeverPark(self._resume)
        self._paused = False
        self._buffered = 0
        self._order = asyncio.Lock()

    async def handle(self, event: Event) -> None:
        if not isinstance(event, RawData):
            await super().handle(event)
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

    async def _handle_events(self) -> None:
        # Reader and resumption take turns: body parts must reach the application in order.
        async with self._order:
            try:
                await super()._handle_events()
            except _Paused:
                self._paused = True
                self._buffered = 0

    def _resume(self) -> None:
        """The answer is out: takes up what was buffered meanwhile, in a task of its own.

        Not in the calling task, which is that of the answered request and would be held by the body
        of the next one.
        """
        if self._paused and self.connection.their_state is h11.IDLE:
            self._paused = False
            self.task_group.spawn(self._handle_events)

    async def _check_protocol(self, event: h11.Request) -> None:
        return None


def install() -> None:
    """Makes Hypercorn use :class:`ReadingH11Protocol` for the connections it accepts from now on."""
    hypercorn_protocol.H11Protocol = ReadingH11Protocol  # type: ignore[attr-defined]
