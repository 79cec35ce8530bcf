"""Text that comes in pieces, for readers written as if all of it were there.

A reader is a generator that takes characters from a :class:`Source` and yields, nothing in particular,
where the text runs out. So it never sees how the text was split, and what it makes of a text cannot
depend on it.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")
Reading = Generator[None, None, Result]
"""A part of a reader, run by ``yield from``."""

SPACE = re.compile(r"[ \t\r\n]*")


class MalformedError(Exception):
    """The text is not what was to be read. The character at fault has not been taken."""


class CutError(Exception):
    """The text ended in the middle."""


class Source:
    """The text that has come, as far as it has not been taken.

    text, at: the present piece, and the place in it of the next character. Readers move ``at``.
    ended: no further piece will come.
    """

    __slots__ = ("_kept", "_mark", "at", "ended", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        self._kept: list[str] | None = None
        self._mark = 0

    def put(self, text: str, ended: bool) -> None:
        """The next piece; the one before must have been taken to its end."""
        if self._kept is not None:
            self._kept.append(self.text[self._mark :])
        self.text, self.at, self._mark = text, 0, 0
        self.ended = self.ended or ended

    def keep(self, lead: str = "") -> None:
        """From here on what is taken is remembered, behind ``lead``."""
        self._kept, self._mark = [lead], self.at

    def forget(self) -> str:
        """What was taken since ``keep``, which is at an end."""
        if self._kept is None:
            return ""
        found = "".join(self._kept) + self.text[self._mark : self.at]
        self._kept = None
        return found

    @property
    def keeping(self) -> bool:
        return self._kept is not None

    def more(self) -> Reading[bool]:
        """Waits for a character; False if the text has ended."""
        while self.at >= len(self.text):
            if self.ended:
                return False
            yield
        return True

    def peek(self) -> Reading[str]:
        """The next character, left in place. Raises CutError at the end."""
        if self.at >= len(self.text) and not (yield from self.more()):
            raise CutError
        return self.text[self.at]

    def after_space(self) -> Reading[str]:
        """The next character that is not white space, left in place. Raises CutError at the end."""
        while True:
            match = SPACE.match(self.text, self.at)
            if match is not None:
                self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not (yield from self.more()):
                raise CutError

    def fault(self) -> Exception:
        """What is wrong with a word that makes no sense: it may only have been cut."""
        return CutError() if self.ended and self.at >= len(self.text) else MalformedError()

    def expect(self, literal: str) -> Reading[None]:
        """Takes exactly ``literal``."""
        for character in literal:
            if (yield from self.peek()) != character:
                raise MalformedError
            self.at += 1

    def run(self, pattern: re.Pattern[str], limit: int) -> Reading[str]:
        """Takes characters for as long as ``pattern``, which matches single ones repeated, holds.

        Ends with the text as well. Raises MalformedError beyond ``limit`` characters.
        """
        found: list[str] = []
        length = 0
        while True:
            match = pattern.match(self.text, self.at)
            if match is not None and match.end() > self.at:
                length += match.end() - self.at
                if length > limit:
                    raise MalformedError
                found.append(match[0])
                self.at = match.end()
            if self.at < len(self.text) or not (yield from self.more()):
                return "".join(found)
