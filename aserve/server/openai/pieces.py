"""What an answer is made of, for the APIs that tell its parts apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """More of the text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a tool begins; what follows it up to the next start belongs to it."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments (JSON) of the call that began last."""

    text: str


Piece = Text | CallStart | CallArguments


class Reader(Protocol):
    """Tells the pieces of one choice apart as its text comes."""

    def feed(self, text: str, ended: bool) -> list[Piece]:
        """The pieces that ``text`` completes; ``ended`` says that no more text will come."""


class TextReader:
    """All of it is text."""

    def feed(self, text: str, ended: bool) -> list[Piece]:
        return [Text(text)] if text else []
