"""Bytes of server-sent events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"


def event(payload: dict[str, Any]) -> bytes:
    """One event holding ``payload`` as compact JSON."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def named_event(name: str, payload: dict[str, Any]) -> bytes:
    """The same with an ``event`` line before it."""
    return b"event: " + name.encode() + b"\n" + event(payload)


class Template:
    """An event of which only one string changes, serialised but for that string.

    make: builds the payload around the string it is given; the string must occur in it once.
    name: goes into an ``event`` line, if there is one.
    """

    __slots__ = ("_head", "_tail")

    def __init__(self, make: Callable[[str], dict[str, Any]], name: str | None = None) -> None:
        payload = make(_MARK)
        whole = event(payload) if name is None else named_event(name, payload)
        head, found, tail = whole.partition(orjson.dumps(_MARK))
        if not found or _MARK.encode() in tail:
            raise ValueError("a template needs its string exactly once")
        self._head, self._tail = head, tail

    def fill(self, text: str) -> bytes:
        """The same bytes as ``event(make(text))``."""
        return self._head + orjson.dumps(text) + self._tail


_MARK = "\ufdd0 here goes the text \ufdd1"
