"""Lines of a batch file: a request each, and an answer each."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import orjson

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_ID = 512


@dataclass(frozen=True, slots=True)
class Line:
    """A request: ``body`` is what is to be posted to ``url``."""

    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request. ``custom_id`` if it has one all the same."""

    custom_id: str | None
    problem: str


def read(source: IO[bytes], max_bytes: int) -> Iterator[Line | BadLine]:
    """The lines of a file, blank ones left out. No line longer than ``max_bytes`` is held in memory."""
    number = 0
    while data := source.readline(max_bytes + 1):
        number += 1
        if len(data) > max_bytes and not data.endswith(b"\n"):
            while (rest := source.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            yield BadLine(None, f"line {number} has more than {max_bytes} bytes")
        elif data.strip():
            yield parse(data, number)


def parse(data: bytes, number: int) -> Line | BadLine:
    """The request in the line ``number`` of a file."""
    try:
        values = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        return BadLine(None, f"line {number} is not valid JSON: {error}")
    if not isinstance(values, dict):
        return BadLine(None, f"line {number} is not a JSON object")
    custom_id = values.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID:
        return BadLine(None, f"line {number}: custom_id must be a string of 1 to {MAX_ID} characters")
    url, body = str(values.get("url")), values.get("body")
    problem = None
    if values.get("method", "POST") != "POST":
        problem = "method must be POST"
    elif url not in URLS:
        problem = f"url must be one of {', '.join(URLS)}"
    elif not isinstance(body, dict):
        problem = "body must be an object"
    elif body.get("stream"):
        problem = "body.stream: answers of a batch are not streamed"
    if problem is not None:
        return BadLine(custom_id, f"line {number}: {problem}")
    return Line(custom_id, url, orjson.dumps(body))


def answer(custom_id: str, status: int, request_id: str | None, body: bytes) -> bytes:
    """The line that answers a request which has reached its route.

    A status other than 200 is told twice, for readers that look at ``error`` and for those that look at
    the response.
    """
    value = orjson.loads(body) if body else None
    error = None
    if status != 200:
        told = value.get("error") if isinstance(value, dict) else None
        described: dict[str, Any] = told if isinstance(told, dict) else {}
        error = {
            "code": described.get("type") or str(status),
            "message": described.get("message") or f"status {status}",
        }
    response = {"status_code": status, "request_id": request_id, "body": value}
    return _line(custom_id, response, error)


def refusal(line: BadLine) -> bytes:
    """The line that answers one which is no request."""
    return _line(line.custom_id, None, {"code": "invalid_line", "message": line.problem})


def _line(custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    value = {
        "id": f"batch_req_{secrets.token_hex(16)}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
