"""Reads request bodies without holding the event loop, whatever they are.

Parsing JSON holds the interpreter: a body of a few megabytes that is made of small values stops every
stream for a hundred milliseconds. So a small body is parsed at once; of a larger one the separators are
counted first, which tells a flood of values in a fraction of a millisecond; and what may be meant seriously
is parsed in a process of its own, which returns only what keeps to its limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from aserve.engine.pool import BoundedPool
from aserve.errors import AserveError, EngineBusyError, InvalidRequestError
from aserve.server.body_child import MAX_VALUES, read_message, too_many_values, write_message

SMALL_BYTES = 8 << 10
"""A body up to this size is parsed at once."""

INLINE_BYTES = 64 << 10
INLINE_VALUES = 5000
"""So is one up to these two."""

READ_SECONDS = 10.0
"""Seconds the process may take for one body."""

MOST_WAITING = 64
"""Large bodies being read or waiting for it; more are refused."""

_PIECE = 64 << 10
_PIECES_IN_A_ROW = 16
_HEAD = 8 << 10
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}:,]', re.DOTALL)


@dataclass(frozen=True)
class Limits:
    """What a kind of body may hold.

    most: items of a field that is an array or an object. ids: the field, if there is one, that holds token
    ids or lists of them. numbers: values that may come on top of MAX_VALUES because a field may be longer.
    """

    most: Mapping[str, int]
    ids: str | None = None
    numbers: int = field(init=False)
    as_json: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", sum(each for each in self.most.values() if each > MAX_VALUES))
        object.__setattr__(self, "as_json", orjson.dumps({"most": dict(self.most), "ids": self.ids}))


def is_large(data: bytes) -> bool:
    """Whether a body is not to be parsed in the event loop."""
    size = len(data)
    return size > SMALL_BYTES and (size > INLINE_BYTES or data.count(b",") > INLINE_VALUES)


async def refuse_flood(data: bytes, limits: Limits, max_model_len: int | None) -> None:
    """Raises InvalidRequestError for a body that surely has more values than any that is meant seriously.

    Counted is what cannot be anything else: strings, by their quotes less the backslashes that there are;
    and other values, by the separators between them, in pieces that begin outside of every string and have
    no quote. Token ids are as many as the context holds for each list; without ``max_model_len`` they are
    not counted.
    """
    quotes = backslashes = lists = separators = opened = 0
    for number, start in enumerate(range(0, len(data), _PIECE)):
        end = start + _PIECE
        found = data.count(b'"', start, end)
        backslashes += data.count(b"\\", start, end)
        if not found and not backslashes and quotes % 2 == 0:
            arrays = data.count(b"[", start, end)
            lists += arrays
            opened += arrays + data.count(b"{", start, end)
            separators += data.count(b",", start, end)
        elif limits.ids is not None:
            lists += data.count(b"[", start, end)
        quotes += found
        if quotes - backslashes > 2 * MAX_VALUES or opened > MAX_VALUES:
            raise too_many_values(_field_of(data))
        if separators > MAX_VALUES + limits.numbers + _most_ids(lists, limits, max_model_len):
            if limits.ids is not None and b"truncate_prompt_tokens" in data:
                return
            raise _too_many_ids(data, limits, max_model_len)
        if number % _PIECES_IN_A_ROW == _PIECES_IN_A_ROW - 1:
            await asyncio.sleep(0)


def _most_ids(lists: int, limits: Limits, max_model_len: int | None) -> float:
    if limits.ids is None:
        return 0
    return float("inf") if max_model_len is None else lists * max_model_len


def _too_many_ids(data: bytes, limits: Limits, max_model_len: int | None) -> InvalidRequestError:
    name = _field_of(data)
    if name is not None and name == limits.ids:
        return InvalidRequestError(
            f"the model's context holds {max_model_len} tokens, and {name} is longer", param=name
        )
    if name is not None and limits.most.get(name, 0) > MAX_VALUES:
        return InvalidRequestError(
            f"{name}: List should have at most {limits.most[name]} items [too_long]", param=name
        )
    return too_many_values(name)


def _field_of(data: bytes) -> str | None:
    """The field whose array or object goes on beyond the beginning of a body, if there is one."""
    depth, name, text = 0, None, b""
    for found in _TOKEN.finditer(data, 0, _HEAD):
        token = found[0]
        if token in b"[{":
            depth += 1
        elif token in b"]}":
            depth -= 1
        elif depth == 1 and token == b":":
            name = text
        text = token
    if depth < 2 or name is None:
        return None
    return name[1:-1].decode(errors="replace")[:64]


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

    async def read(self, data: bytes, limits: Limits, max_model_len: int | None = None) -> dict[str, Any]:
        """The fields of a body, whose token ids are arrays. Raises InvalidRequestError, QueueFullError."""
        await refuse_flood(data, limits, max_model_len)
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
            self._end(process)

    # ---------------------------------------------------------------- in the thread

    def _ask(self, data: bytes, limits: Limits) -> dict[str, Any]:
        process = self._running()
        self.count += 1
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(READ_SECONDS, end)
        timer.start()
        reply = None
        try:
            # Its end shows as a broken pipe or as the end of its output.
            with contextlib.suppress(OSError, ValueError):
                source, sink = cast("BinaryIO", process.stdout), cast("BinaryIO", process.stdin)
                write_message(sink, limits.as_json)
                write_message(sink, data)
                reply = read_message(source)
        finally:
            timer.cancel()
        if late.is_set() or reply is None:
            self._end(process)
            if self._closed:
                raise EngineBusyError("the server is stopping")
            took = f"took longer than {READ_SECONDS:g} seconds to read"
            raise InvalidRequestError(f"the body {took if late.is_set() else 'could not be read'}")
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
                self._process = _start()
            except OSError as error:
                raise EngineBusyError(f"large bodies cannot be read now: {error.strerror}") from error
            started = self._process
        if process is not None:
            self._end(process)
        return started

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()


def _start() -> subprocess.Popen[bytes]:
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    # A session of its own: an interrupt typed at the terminal is for the server alone.
    return subprocess.Popen(
        [sys.executable, "-m", "aserve.server.body_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )
