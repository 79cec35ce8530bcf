"""Runs the requests of a batch through the server's routes, without a socket."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from aserve.batch import lines
from aserve.batch.lines import BadLine, Line

if TYPE_CHECKING:
    from quart import Quart


@dataclass
class Totals:
    """How many lines were answered, refused by their route, and no requests at all."""

    done: int = 0
    refused: int = 0
    bad: int = 0


async def run(
    app: Quart,
    source: Iterable[Line | BadLine],
    target: IO[bytes],
    *,
    in_flight: int,
    progress: Callable[[], object] = lambda: None,
) -> Totals:
    """Answers every line of ``source`` on ``target``, in order.

    in_flight: lines that are held at a time, from being read to being written: what bounds the memory.
    progress: called after each line that is written.
    """
    totals = Totals()
    pending: deque[asyncio.Task[bytes]] = deque()

    async def write_first() -> None:
        target.write(await pending[0])
        target.flush()
        pending.popleft()
        progress()

    try:
        for line in source:
            if len(pending) >= in_flight:
                await write_first()
            pending.append(asyncio.create_task(_answer(app, line, totals)))
            await asyncio.sleep(0)
        while pending:
            await write_first()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return totals


async def _answer(app: Quart, line: Line | BadLine, totals: Totals) -> bytes:
    if isinstance(line, BadLine):
        totals.bad += 1
        return lines.refusal(line)
    status, request_id, body = await post(app, line.url, line.body)
    totals.done += status == 200
    totals.refused += status != 200
    return lines.answer(line.custom_id, status, request_id, body)


async def post(app: Quart, path: str, body: bytes) -> tuple[int, str | None, bytes]:
    """One exchange with the application; gives status, ``X-Request-Id`` and body."""
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"batch"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
        "state": {},
        "extensions": {},
    }
    sent = False
    status, request_id = 500, None
    parts: list[bytes] = []

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # nobody goes away here
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status, request_id
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {bytes(name).lower(): bytes(value) for name, value in message["headers"]}
            found = headers.get(b"x-request-id")
            request_id = found.decode("latin-1") if found is not None else None
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(scope, receive, send)  # type: ignore[arg-type]
    return status, request_id, b"".join(parts)
