"""A small HTTP client for streamed completions.

The load generator shares the machine with the server it measures, so it must cost little: this one is an
``asyncio.Protocol`` that finds event boundaries in the bytes as they arrive and parses JSON only until a
response's first token and for its last event. Connections are kept alive from one answer to the next.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from aserve.errors import ConfigError


@dataclass(slots=True)
class Answer:
    """One request as its client saw it. Seconds; ``start`` is of ``time.perf_counter``.

    ttft: until the first event that carries a token. itl: between the later events that do.
    latency: until the end of the answer. error: what went wrong, None for a success.
    """

    start: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    itl: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first; 0 for a single token."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


class Client:
    """Connections to one server. ``url``: scheme, host and port; a path in it prefixes every endpoint."""

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"not an http:// or https:// address: {url!r}", param="base_url")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self._prefix = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        extra = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._head = f"Host: {parts.netloc}\r\n{extra}"
        self._free: list[_Connection] = []

    async def get(self, path: str) -> Any:
        """The JSON at ``path``. OSError when there is no server, ValueError for any other answer."""
        status, body = await self._whole(f"GET {self._prefix}{path} HTTP/1.1\r\n{self._head}\r\n".encode())
        if status != 200:
            raise ValueError(f"GET {path}: status {status}: {body[:300].decode('utf-8', 'replace')}")
        return json.loads(body)

    async def stream(self, path: str, payload: dict[str, Any]) -> Answer:
        """Posts ``payload`` and times the events of the answer. Failures are in ``Answer.error``."""
        body = json.dumps(payload, separators=(",", ":")).encode()
        head = (
            f"POST {self._prefix}{path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        events = _Events()
        started = time.perf_counter()
        try:
            connection = await self._exchange(head.encode() + body, events)
        except (OSError, ValueError) as error:
            return Answer(start=started, error=f"{type(error).__name__}: {error}")
        self._keep(connection)
        return events.answer(started, connection.status)

    def close(self) -> None:
        for connection in self._free:
            connection.close()
        self._free.clear()

    async def _whole(self, request: bytes) -> tuple[int, bytes]:
        body = _Body()
        connection = await self._exchange(request, body)
        self._keep(connection)
        return connection.status, bytes(body.data)

    async def _exchange(self, request: bytes, body: _Body) -> _Connection:
        """Sends the request over a kept connection, or a new one where the server has given those up."""
        while self._free:
            kept = self._free.pop()
            if kept.usable:
                try:
                    await kept.exchange(request, body)
                except ConnectionError:
                    if kept.answering:
                        raise
                else:
                    return kept
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(_Connection, self.host, self.port, ssl=self._tls)
        await made.exchange(request, body)
        return made

    def _keep(self, connection: _Connection) -> None:
        if connection.usable:
            self._free.append(connection)
        else:
            connection.close()


class _Body:
    """Collects a body."""

    def __init__(self) -> None:
        self.data = bytearray()

    def feed(self, data: bytes, now: float) -> None:
        self.data += data


class _Events(_Body):
    """Takes server-sent events apart; a line starting with ``data:`` is one event."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.last = b""
        self.done = False
        self._rest = b""

    def feed(self, data: bytes, now: float) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                if line.strip():
                    self.data += line  # the body of an error answer
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self.done = True
                continue
            self.last = payload
            if self.times or _has_token(payload):
                self.times.append(now)

    def answer(self, started: float, status: int) -> Answer:
        if status != 200:
            text = bytes(self.data + self._rest)[:300].decode("utf-8", "replace")
            return Answer(start=started, error=f"status {status}: {text}")
        last = _parsed(self.last) if self.last else {}
        times = self.times
        if "error" in last:
            return Answer(start=started, error=f"error event: {last['error']}")
        if not self.done or not times:
            return Answer(start=started, error="the stream ended early")
        if not last.get("choices") and len(times) > 1:  # an event of its own for the usage
            times = times[:-1]
        usage = last.get("usage") or {}
        return Answer(
            start=started,
            ttft=times[0] - started,
            latency=times[-1] - started,
            itl=[after - before for before, after in itertools.pairwise(times)],
            prompt_tokens=usage.get("prompt_tokens", 0),
            output_tokens=usage.get("completion_tokens", len(times)),
        )


def _parsed(payload: bytes) -> dict[str, Any]:
    try:
        value = json.loads(payload)
    except ValueError:
        return {"error": f"not JSON: {payload[:100]!r}"}
    return value if isinstance(value, dict) else {"error": f"not an object: {payload[:100]!r}"}


def _has_token(payload: bytes) -> bool:
    """Whether the event carries output: not a chat stream's opening chunk, which only names the role."""
    value = _parsed(payload)
    for choice in value.get("choices") or []:
        delta = choice.get("delta")
        if delta is None or delta.get("content") or choice.get("finish_reason"):
            return True
    return False


class _Connection(asyncio.Protocol):
    """HTTP/1.1, one request at a time: Content-Length, chunked, or a body that ends with the connection."""

    def __init__(self) -> None:
        self.status = 0
        self.usable = False
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._reset(_Body())

    @property
    def answering(self) -> bool:
        """Whether anything of the present answer has come."""
        return self._headers_read or bool(self._buffer)

    def _reset(self, body: _Body) -> None:
        self._body = body
        self._buffer = b""
        self._headers_read = False
        self._chunked = False
        self._left: int | None = 0  # bytes of the body or chunk still to come; None: until the end
        self._keep_alive = True

    async def exchange(self, request: bytes, body: _Body) -> None:
        """Sends the request and feeds ``body`` until the answer is whole. OSError: the connection broke."""
        transport = self._transport
        if transport is None:
            raise ConnectionResetError("the connection is closed")
        self._reset(body)
        self.usable = False
        self._waiter = asyncio.get_running_loop().create_future()
        transport.write(request)
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.close()
            raise
        self.usable = self._keep_alive and self._transport is not None

    def close(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.usable = False
        if self._headers_read and self._left is None:
            self._finish()
        else:
            self._fail(exc or ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            self._take(data, now)
        except ValueError as error:
            self._fail(error)
            self.close()

    def _take(self, data: bytes, now: float) -> None:
        if not self._headers_read:
            self._buffer += data
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data, self._buffer = self._buffer[:end], self._buffer[end + 4 :], b""
            self._read_head(head.decode("latin-1"))
        if self._chunked:
            self._take_chunks(self._buffer + data if self._buffer else data, now)
        elif self._left is None:
            self._body.feed(data, now)
        else:
            self._body.feed(data[: self._left], now)
            self._left -= len(data)
            if self._left <= 0:
                self._finish()

    def _read_head(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"not an HTTP answer: {first[:100]!r}")
        self.status = int(rest[:3])
        headers = {
            name.strip().lower(): value.strip().lower()
            for name, _, value in (line.partition(":") for line in lines)
        }
        self._headers_read = True
        self._keep_alive = headers.get("connection") != "close"
        self._chunked = "chunked" in headers.get("transfer-encoding", "")
        if not self._chunked:
            length = headers.get("content-length")
            self._left = int(length) if length is not None else None
            self._keep_alive = self._keep_alive and length is not None

    def _take_chunks(self, data: bytes, now: float) -> None:
        while True:
            end = data.find(b"\r\n")
            if end < 0:
                break
            size = int(data[:end].split(b";")[0], 16)
            if len(data) < end + 4 + size:
                break
            if size == 0:
                self._finish()
                return
            self._body.feed(data[end + 2 : end + 2 + size], now)
            data = data[end + 4 + size :]
        self._buffer = data

    def _finish(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
