"""Reads request bodies without holding the event loop, whatever they are.

Parsing JSON holds the interpreter: a body of a few megabytes that is made of small values stops every
stream for a hundred milliseconds. So a small body is parsed at once. A larger one is surveyed while it comes,
and what may be meant seriously is parsed in a process of its own, which returns only what keeps to its
limits.
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import threading
from typing import Any

import orjson

from aserve import pipes
from aserve.engine.pool import BoundedPool
from aserve.errors import AserveError, EngineBusyError, InvalidRequestError
from aserve.server.survey import Limits

SMALL_BYTES = 8 << 10
"""A body up to this size is parsed at once."""

INLINE_BYTES = 64 << 10
INLINE_VALUES = 5000
"""So is one up to these two."""

READ_SECONDS = 10.0
"""Seconds the process may take for one body."""

MOST_WAITING = 64
"""Large bodies being read or waiting for it; more are refused."""


def is_large(data: bytes) -> bool:
    """Whether a body is not to be parsed in the event loop."""
    size = len(data)
    return size > SMALL_BYTES and (size > INLINE_BYTES or data.count(b",") > INLINE_VALUES)


class BodyReader:
    """Has large bodies read by a process, one at a time; it is started for the first, and after its end."""

    def __init__(self) -> None:
        self._pool = BoundedPool("aserve-body", workers=1, most=MOST_WAITING)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._closed = False
        self.count = 0
        """Bodies given to the process so far."""

    @property
    def pid(self) -> int | None:
        """Of the running process; None if there is none."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    async def read(self, data: bytes, limits: Limits) -> dict[str, Any]:
        """The fields of a body, whose token ids are arrays. Raises InvalidRequestError, QueueFullError."""
        return await self._pool.run(self._ask, data, limits)

    async def warm(self) -> None:
        """Starts the process before a body comes. A process that cannot be started is noticed by that."""
        with contextlib.suppress(AserveError):
            await self._pool.run(self._running)

    def close(self) -> None:
        """Ends the process for good. May be called from any thread; what waits fails."""
        with self._lock:
            self._closed = True
            process = self._process
        self._pool.close()
        if process is not None:
            pipes.end(process)

    # ---------------------------------------------------------------- in the thread

    def _ask(self, data: bytes, limits: Limits) -> dict[str, Any]:
        process = self._running()
        self.count += 1
        reply, late = pipes.ask(process, (limits.as_json, data), READ_SECONDS)
        if late or reply is None:
            pipes.end(process)
            if self._closed:
                raise EngineBusyError("the server is stopping")
            took = f"took longer than {READ_SECONDS:g} seconds to read"
            raise InvalidRequestError(f"the body {took if late else 'could not be read'}")
        if reply[:1] != b"+":
            message, param = orjson.loads(reply[1:])
            raise InvalidRequestError(message, param=param)
        values: dict[str, Any] = pickle.loads(memoryview(reply)[1:])
        return values

    def _running(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise EngineBusyError("the server is stopping")
            process = self._process
            if process is not None and process.poll() is None:
                return process
            try:
                self._process = pipes.start("aserve.server.body_child")
            except OSError as error:
                raise EngineBusyError(f"large bodies cannot be read now: {error.strerror}") from error
            started = self._process
        if process is not None:
            pipes.end(process)
        return started
