"""Looks at a request's body while it is still coming, so that an absurd one is refused before it is there.

Nothing is parsed: bytes are counted, which costs a fraction of a millisecond for a megabyte. What is told
with certainty is refused at once: a flood of values, and a text that no context could hold. All else is
left to who parses the body.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson

from aserve.errors import InvalidRequestError
from aserve.server.body_child import MAX_VALUES, too_many_values

LEAST_LONGEST = 512 << 10
"""Characters that a text may have whatever the model's context: other things than prompts are texts too."""

_PIECE = 64 << 10
_HEAD = 8 << 10
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}:,]', re.DOTALL)
_TRUNCATES = b"truncate_prompt_tokens"


@dataclass(frozen=True)
class Limits:
    """What a kind of body may hold.

    most: items of a field that is an array or an object. ids: the field, if there is one, that holds token
    ids or lists of them; more than the context holds may be sent together with truncate_prompt_tokens.
    numbers: values that may come on top of MAX_VALUES because a field may be longer.
    """

    most: Mapping[str, int]
    ids: str | None = None
    numbers: int = field(init=False)
    as_json: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", sum(each for each in self.most.values() if each > MAX_VALUES))
        object.__setattr__(self, "as_json", orjson.dumps({"most": dict(self.most), "ids": self.ids}))


class Survey:
    """Counts what a body surely holds.

    Values: strings, by their quotes less the backslashes that there are; and others, by the separators
    between them, in pieces that begin outside of every string and have no quote. Characters of a text: those
    from one quote to the next, as long as it is certain which quotes begin one.

    max_model_len: token ids of a list; None, while the model is being loaded, to count none. longest:
    characters of a text, None for any.
    """

    def __init__(self, limits: Limits, max_model_len: int | None = None, longest: int | None = None) -> None:
        self._limits = limits
        self._max_model_len = max_model_len
        self._longest = longest
        self._head = b""
        self._backslash = b""
        self._tail = b""
        self._quotes = self._backslashes = self._lists = self._separators = self._opened = 0
        self._in_text = False
        self._sure = longest is not None
        self._twelfths = 0
        self._seen = self._began = 0
        self._pending: InvalidRequestError | None = None
        self._truncated = False

    def feed(self, data: bytes) -> None:
        """Takes the next part of the body. Raises InvalidRequestError if it cannot be meant seriously."""
        if len(self._head) < _HEAD:
            self._head += data[: _HEAD - len(self._head)]
        if self._limits.ids is not None:
            self._look_for_truncation(data)
        if self._pending is not None:
            return
        data, self._backslash, start = self._backslash + data, b"", 0
        while start < len(data):
            end = min(start + _PIECE, len(data))
            if data[end - 1] == 0x5C:  # what it escapes belongs to it
                end -= 1
                if end == len(data) - 1:
                    self._backslash = data[end:]
            if start == end:
                break
            self._count(data[start:end])
            start = end

    def _count(self, piece: bytes) -> None:
        self._count_values(piece)
        if self._sure:
            self._count_characters(piece)
        self._seen += len(piece)

    def finish(self) -> None:
        """Is called at the end of the body. Raises InvalidRequestError for what only then is certain."""
        if self._pending is not None and not self._truncated:
            raise self._pending

    def _look_for_truncation(self, data: bytes) -> None:
        seen = self._tail + data
        self._truncated = self._truncated or _TRUNCATES in seen
        self._tail = seen[-len(_TRUNCATES) :]

    def _count_values(self, piece: bytes) -> None:
        limits, quotes = self._limits, piece.count(b'"')
        self._backslashes += piece.count(b"\\")
        if not quotes and not self._backslashes and self._quotes % 2 == 0:
            arrays = piece.count(b"[")
            self._lists += arrays
            self._opened += arrays + piece.count(b"{")
            self._separators += piece.count(b",")
        elif limits.ids is not None:
            self._lists += piece.count(b"[")
        self._quotes += quotes
        if self._quotes - self._backslashes > 2 * MAX_VALUES or self._opened > MAX_VALUES:
            raise too_many_values(self._field())
        if self._separators > MAX_VALUES + limits.numbers + self._most_ids():
            error = self._too_many_ids()
            if limits.ids is None or error.param not in (None, limits.ids):
                raise error
            self._pending = error

    def _most_ids(self) -> float:
        if self._limits.ids is None:
            return 0
        return float("inf") if self._max_model_len is None else self._lists * self._max_model_len

    def _count_characters(self, piece: bytes) -> None:
        # Hazard: after an escaped backslash a quote may or may not be escaped. Then nothing is certain.
        if b"\\" in piece and (b"\\\\" in piece or piece[-1:] == b"\\"):
            self._sure = False
            return
        escapes = piece.count(b"\\")
        first, last = _quote(piece, forward=True), _quote(piece, forward=False)
        before = piece if first < 0 else piece[:first]
        if self._in_text:
            self._twelfths += _twelfths(before, escapes)
            if self._twelfths > 12 * (self._longest or 0):
                raise self._too_long()
        if first >= 0:
            self._in_text ^= (piece.count(b'"') - piece.count(b'\\"')) % 2 == 1
            self._began = self._seen + last
            self._twelfths = _twelfths(piece[last + 1 :], escapes) if self._in_text else 0

    def _too_long(self) -> InvalidRequestError:
        name = self._field(text=True) if self._began < _HEAD else None
        place = "" if name is None else f"{name}: "
        return InvalidRequestError(
            f"{place}a text may have at most {self._longest} characters [string_too_long]", param=name
        )

    def _too_many_ids(self) -> InvalidRequestError:
        limits, name = self._limits, self._field()
        if name is not None and name == limits.ids:
            return InvalidRequestError(
                f"the model's context holds {self._max_model_len} tokens, and {name} is longer", param=name
            )
        if name is not None and limits.most.get(name, 0) > MAX_VALUES:
            return InvalidRequestError(
                f"{name}: List should have at most {limits.most[name]} items [too_long]", param=name
            )
        return too_many_values(name)

    def _field(self, *, text: bool = False) -> str | None:
        """The field whose array or object, or also ``text``, goes on beyond the beginning of the body."""
        depth, name, last = 0, None, b""
        for found in _TOKEN.finditer(self._head):
            token = found[0]
            if token in b"[{":
                depth += 1
            elif token in b"]}":
                depth -= 1
            elif depth == 1 and token == b":":
                name = last
            last = token
        if name is None or (depth < 2 and not (text and last == b":")):
            return None
        return name[1:-1].decode(errors="replace")[:64]


def _quote(piece: bytes, *, forward: bool) -> int:
    """Where the first or the last quote is that is not escaped; -1 without one. No backslash is escaped."""
    at = piece.find(b'"') if forward else piece.rfind(b'"')
    while at > 0 and piece[at - 1] == 0x5C:
        at = piece.find(b'"', at + 1) if forward else piece.rfind(b'"', 0, at)
    return at


def _twelfths(piece: bytes, escapes: int) -> int:
    """Twelve times the characters that a part of a JSON text has at least.

    A character takes up to 12 bytes if it is escaped, and up to 4 in UTF-8.
    """
    if escapes:
        return len(piece)
    rest = max(0, len(piece) - 11)  # the end of one that began in the part before
    return 12 * rest if piece.isascii() else 3 * rest
