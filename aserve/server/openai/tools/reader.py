"""What the readers of every format have in common: telling text from calls, and handing both on."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass

from aserve.server.openai.pieces import CallArguments, CallStart, Piece, Text
from aserve.server.openai.tools.json_text import Say, captured_string, read_value
from aserve.server.openai.tools.source import CutError, MalformedError, Reading, Source

MAX_KEY = 256
MAX_QUOTED_ARGUMENTS = 1 << 20
"""Characters of arguments that a model wrote as a string holding JSON; they are kept until they end."""

_NAME = re.compile(r"[^\x00-\x20\x7f\ud800-\udfff]{1,256}")
_CALL_KEYS = {"name", "arguments", "parameters", "type", "id"}


@dataclass(frozen=True)
class Context:
    """What a reader knows of its request.

    names: the tools there are. new_id: makes ids of calls. parallel: whether there may be more than one
    call; further ones are dropped. whole: nothing is waiting for the text, so that no piece of a call
    need be told before the call is known to be one.
    """

    names: Collection[str]
    new_id: Callable[[], str]
    parallel: bool = True
    whole: bool = False


class CallReader(ABC):
    """Tells text and calls apart as a text comes (:class:`~aserve.server.openai.pieces.Reader`).

    The pieces, put together, are the same for every way of splitting the text. Arguments are JSON as soon
    as their call is complete. Space around calls is dropped. What begins like a call and is none becomes
    text; once its beginning has been told, its arguments end where it went wrong and what follows is text.
    Time and memory grow linearly with the text. Subclasses give ``read``.
    """

    markers: tuple[str, ...] = ()
    """What the tokenizer must not leave out of the text."""

    how = ""
    """Tells a model whose chat template knows no tools how to call one."""

    @staticmethod
    def write(calls: list[str]) -> str:
        """Earlier calls, ``{"name": ..., "arguments": ...}`` each, for such a model to see."""
        return f"[{','.join(calls)}]"

    def __init__(self, context: Context) -> None:
        self.context = context
        self.source = Source()
        self._pieces: list[Piece] = []
        self._withheld: list[Piece] = []
        self._space: list[str] = []
        self._calls = 0
        self._broken = False
        self._dropping = False
        self._started = self._complete = False
        self._reading = self._read_all()

    @abstractmethod
    def read(self) -> Reading[None]:
        """Reads the whole text."""

    def _read_all(self) -> Reading[None]:
        yield from self.read()
        if not self._calls:
            self.say("")

    def feed(self, text: str, ended: bool) -> list[Piece]:
        """The pieces that ``text`` completes; ``ended`` says that no more text will come."""
        if not text and not ended:
            return []
        self.source.put(text, ended)
        next(self._reading, None)
        pieces, self._pieces = self._pieces, []
        return merged(pieces)

    def finish_reason(self, reason: str | None) -> str | None:
        """What the API gives as the cause of the end, of the engine's ``reason``."""
        return "tool_calls" if reason == "stop" and self._calls and not self._broken else reason

    # ---------------------------------------------------------------- handing on

    def say(self, text: str) -> None:
        """More text, behind the space that was held back."""
        if self._space:
            self._pieces.append(Text("".join(self._space)))
            self._space.clear()
        if text:
            self._pieces.append(Text(text))

    def start(self, name: str) -> None:
        """A call begins. Raises MalformedError if it cannot have this name."""
        if not _NAME.fullmatch(name):
            raise MalformedError
        self._dropping = self._calls > 0 and not self.context.parallel
        self._started, self._complete = True, False
        if not self._dropping:
            self._tell(CallStart(self.context.new_id(), name))
        if not self.context.whole:
            self.source.forget()
            self._space.clear()

    def arguments(self, text: str) -> None:
        """More of the arguments of the call that began last."""
        if text and not self._dropping:
            self._tell(CallArguments(text))

    def end(self) -> None:
        """The call's arguments are complete."""
        self._complete = True
        if not self._dropping:
            self._calls += 1
        self._pieces += self._withheld
        self._withheld.clear()
        self._space.clear()
        self.source.forget()

    def _tell(self, piece: Piece) -> None:
        (self._withheld if self.context.whole else self._pieces).append(piece)

    # ---------------------------------------------------------------- reading

    def text_until(self, *markers: str) -> Reading[str | None]:
        """Takes text up to one of ``markers``, which is taken too and returned; None at the end.

        Markers must not contain their first character a second time. Space at the end of the text is held
        back.
        """
        firsts = "".join({re.escape(marker[0]) for marker in markers})
        plain = re.compile(rf"[^{firsts}\s]+") if firsts else re.compile(r"\S+")
        source = self.source
        while (yield from source.more()):
            match = plain.match(source.text, source.at)
            if match is not None:
                source.at = match.end()
                self.say(match[0])
                continue
            match = _SPACES.match(source.text, source.at)
            if match is not None:
                self._space.append(match[0])
                source.at = match.end()
                continue
            found = ""
            candidates = markers
            while candidates and (yield from source.more()):
                character = source.text[source.at]
                candidates = tuple(each for each in candidates if each.startswith(found + character))
                if candidates:
                    source.at += 1
                    found += character
                    if found in candidates:
                        return found
            self.say(found)
        return None

    def opening(self, *markers: str) -> Reading[bool | None]:
        """Waits for what the answer begins with; space before it is kept for an attempt at a call.

        True: one of ``markers``, which is taken and kept as well. False: something else. None: it ends
        before that is known, or has only begun like a marker; what was taken is text.
        """
        source = self.source
        source.keep()
        found = ""
        candidates = markers
        try:
            yield from source.after_space()
            while True:
                character = yield from source.peek()
                candidates = tuple(each for each in candidates if each.startswith(found + character))
                if not candidates:
                    break
                source.at += 1
                found += character
                if found in candidates:
                    return True
        except CutError:
            found = found or " "
        if not found:
            return False
        self.say(source.forget())
        return None

    def begins(self, characters: str) -> Reading[bool]:
        """Whether the next character that is no space, which is left in place, is one of these."""
        try:
            return (yield from self.source.after_space()) in characters
        except CutError:
            return False

    def attempt(self, reading: Reading[None]) -> Reading[bool]:
        """Runs ``reading`` of one call; whether it has been one.

        Where it was none, what has been taken since ``source.keep``, which is done here if it was not
        before, becomes text.
        """
        self._started = self._complete = False
        if not self.source.keeping:
            self.source.keep()
        try:
            yield from reading
        except MalformedError:
            if not self._complete:
                self._give_up(cut=False)
        except CutError:
            if not self._complete:
                self._give_up(cut=True)
        return self._complete

    def _give_up(self, cut: bool) -> None:
        if not self._started or (self.context.whole and not cut):
            self._withheld.clear()
            self.say(self.source.forget())
            return
        # Too late to take the call back. Or, with a text that ended too early, better than nothing.
        self._pieces += self._withheld
        self._withheld.clear()
        self.source.forget()
        if not self._dropping:
            self._calls += 1
            self._broken = True

    def call_object(self, *, certain: bool) -> Reading[None]:
        """Takes ``{"name": ..., "arguments": {...}}``, with the space before it.

        ``parameters`` is the same as ``arguments``, and either may come as a string that holds an object.
        Without arguments the call has none; what else there is, is skipped.

        certain: the text said that a call would come. Otherwise it is one only if it names a tool that
        there is, and holds nothing unusual before that.
        """
        source = self.source
        name: str | None = None
        early: list[str] | None = None
        if (yield from source.after_space()) != "{":
            raise MalformedError
        source.at += 1
        while (character := (yield from source.after_space())) != "}":
            if character != '"':
                raise MalformedError
            key = yield from captured_string(source, MAX_KEY)
            if not certain and not self._started and key not in _CALL_KEYS:
                raise MalformedError
            if (yield from source.after_space()) != ":":
                raise MalformedError
            source.at += 1
            if key == "name" and name is None:
                if (yield from source.after_space()) != '"':
                    raise MalformedError
                name = yield from captured_string(source, MAX_KEY)
                if not certain and name not in self.context.names:
                    raise MalformedError
                if early is not None:
                    self.start(name)
                    self.arguments("".join(early))
                    self.end()
            elif key in ("arguments", "parameters") and early is None and not self._complete:
                if name is None:
                    early = []
                    yield from self._arguments(early.append)
                else:
                    yield from self._arguments(self.arguments, name)
                    self.end()
            else:
                yield from read_value(source, _nowhere)
            character = yield from source.after_space()
            if character == ",":
                source.at += 1
            elif character != "}":
                raise MalformedError
        if name is None:
            raise MalformedError
        if not self._complete:
            self.start(name)
            self.arguments("{}")
            self.end()
        source.at += 1

    def _arguments(self, say: Say, name: str | None = None) -> Reading[None]:
        """Takes arguments and says them. name: of the call to start with the first of them."""
        source = self.source
        character = yield from source.after_space()
        if character == "{":
            if name is not None:
                self.start(name)
            yield from read_value(source, say)
            return
        if character == '"':
            text = yield from captured_string(source, MAX_QUOTED_ARGUMENTS)
            if text.strip() and not is_object(text):
                raise MalformedError
        elif character == "n":
            yield from source.expect("null")
            text = ""
        else:
            raise MalformedError
        if name is not None:
            self.start(name)
        say(text.strip() or "{}")

    def call_list(self, *, certain: bool) -> Reading[bool]:
        """Takes ``[call, ...]``, whose bracket is next; whether there was a call."""
        source = self.source
        if not source.keeping:
            source.keep()
        source.at += 1
        any_call = False
        while True:
            if not (yield from self.attempt(self.call_object(certain=certain))):
                return any_call
            any_call = True
            source.keep()
            try:
                character = yield from source.after_space()
            except CutError:
                source.forget()
                return True
            if character == "]":
                source.at += 1
                source.forget()
                return True
            if character != ",":
                self.say(source.forget())
                return True
            source.at += 1


def _nowhere(text: str) -> None:
    """For what is read and not used."""


def is_object(text: str) -> bool:
    """Whether ``text`` is a JSON object."""
    try:
        text.encode()  # refuses lone surrogates, which cannot be sent
        return isinstance(json.loads(text, parse_constant=_refuse), dict)
    except (ValueError, RecursionError):
        return False


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and infinities, which Python's parser takes


_SPACES = re.compile(r"\s+")


def merged(pieces: list[Piece]) -> list[Piece]:
    """``pieces`` with neighbours of one kind as one."""
    found: list[Piece] = []
    texts: list[str] = []
    kind: type[Text] | type[CallArguments] | None = None
    for piece in pieces:
        if kind is not None and type(piece) is not kind:
            found.append(kind("".join(texts)))
            texts, kind = [], None
        if isinstance(piece, CallStart):
            found.append(piece)
        else:
            texts.append(piece.text)
            kind = type(piece)
    if kind is not None:
        found.append(kind("".join(texts)))
    return found
