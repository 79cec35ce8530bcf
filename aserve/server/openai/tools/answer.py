"""Calls in the wire format of the chat API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aserve.server.openai.pieces import CallArguments, CallStart, Piece, Text


def message_of(pieces: Iterable[Piece]) -> dict[str, Any]:
    """``content``, which is None where there are calls alone, and ``tool_calls`` if there are any."""
    texts: list[str] = []
    calls: list[tuple[CallStart, list[str]]] = []
    for piece in pieces:
        if isinstance(piece, Text):
            texts.append(piece.text)
        elif isinstance(piece, CallStart):
            calls.append((piece, []))
        else:
            calls[-1][1].append(piece.text)
    text = "".join(texts)
    if not calls:
        return {"content": text}
    made = [_call(start) | {"function": _function(start.name, "".join(parts))} for start, parts in calls]
    return {"content": text or None, "tool_calls": made}


class Deltas:
    """The same, as the ``delta`` of a choice's chunks."""

    def __init__(self) -> None:
        self._calls = 0

    def of(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Text):
            return {"content": piece.text}
        if isinstance(piece, CallArguments):
            return {"tool_calls": [{"index": self._calls - 1, "function": {"arguments": piece.text}}]}
        self._calls += 1
        start = {"index": self._calls - 1} | _call(piece) | {"function": _function(piece.name, "")}
        return {"tool_calls": [start]}


def _call(start: CallStart) -> dict[str, Any]:
    return {"id": start.id, "type": "function"}


def _function(name: str, arguments: str) -> dict[str, str]:
    return {"name": name, "arguments": arguments}
