"""JSON as it comes: checked, handed on at once, and made strict where models are lax.

What is handed on has no white space between tokens. Control characters inside strings are escaped,
escapes that JSON does not know become the characters they were written as, a comma before a closing
bracket is dropped, and Python's ``True``, ``False`` and ``None`` are taken for JSON's words: models write
all of these. Everything else that is not JSON (RFC 8259) raises MalformedError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from aserve.server.openai.tools.source import MalformedError, Reading, Source

MAX_DEPTH = 100
"""Of brackets: beyond it parsers of other languages, and templates, give up in ways of their own."""

MAX_NUMBER = 400
"""Characters of a number. Python refuses to read integers of more than 4300 digits."""

Say = Callable[[str], None]

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_HEX = re.compile(r"[0-9a-fA-F]+")
_WORD = re.compile(r"[A-Za-z]+")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_IN_NUMBERS = re.compile(r"[-+.0-9eE]+")
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_CLOSING = {"{": "}", "[": "]"}


def read_value(source: Source, say: Say) -> Reading[None]:
    """Takes one value, with the space before it."""
    open_brackets: list[str] = []
    while True:
        # Here a value is due.
        character = yield from source.after_space()
        if character in "{[":
            if len(open_brackets) == MAX_DEPTH:
                raise MalformedError
            source.at += 1
            open_brackets.append(character)
            say(character)
            if (yield from source.after_space()) != _CLOSING[character]:
                if character == "{":
                    yield from _key(source, say)
                continue
        else:
            yield from _scalar(source, character, say)
        # Here a value has just ended, or a bracket that holds nothing is about to.
        while open_brackets:
            character = yield from source.after_space()
            if character == _CLOSING[open_brackets[-1]]:
                source.at += 1
                open_brackets.pop()
                say(character)
            elif character == ",":
                source.at += 1
                if (yield from source.after_space()) == _CLOSING[open_brackets[-1]]:
                    continue
                say(",")
                if open_brackets[-1] == "{":
                    yield from _key(source, say)
                break
            else:
                raise MalformedError
        if not open_brackets:
            return


def _key(source: Source, say: Say) -> Reading[None]:
    if (yield from source.after_space()) != '"':
        raise MalformedError
    yield from read_string(source, say)
    if (yield from source.after_space()) != ":":
        raise MalformedError
    source.at += 1
    say(":")


def _scalar(source: Source, character: str, say: Say) -> Reading[None]:
    if character == '"':
        yield from read_string(source, say)
    elif character == "-" or "0" <= character <= "9":
        say((yield from read_number(source)))
    else:
        word = _WORDS.get((yield from source.run(_WORD, 5)))
        if word is None:
            raise source.fault()
        say(word)


def read_number(source: Source) -> Reading[str]:
    """Takes a number and everything a number might hold that follows it."""
    number = yield from source.run(_IN_NUMBERS, MAX_NUMBER)
    if not _NUMBER.fullmatch(number):
        raise source.fault()
    return number


def read_string(source: Source, say: Say) -> Reading[None]:
    """Takes a string, whose opening quote is next."""
    source.at += 1
    say('"')
    while True:
        match = _PLAIN.match(source.text, source.at)
        if match is not None:
            say(match[0])
            source.at = match.end()
        character = yield from source.peek()
        if character == '"':
            source.at += 1
            say('"')
            return
        if character == "\\":
            source.at += 1
            yield from _escape(source, say)
        elif character < " ":
            source.at += 1
            say(json.dumps(character)[1:-1])


def _escape(source: Source, say: Say) -> Reading[None]:
    character = yield from source.peek()
    if character in '"\\/bfnrt':
        source.at += 1
        say("\\" + character)
    elif character == "'":
        source.at += 1
        say("'")
    elif character == "u":
        source.at += 1
        digits = ""
        while len(digits) < 4 and _HEX.match((yield from source.peek())):
            digits += source.text[source.at]
            source.at += 1
        say(("\\u" if len(digits) == 4 else "\\\\u") + digits)
    else:
        say("\\\\")


def captured_string(source: Source, limit: int) -> Reading[str]:
    """The decoded string whose opening quote is next. MalformedError beyond ``limit`` characters."""
    parts: list[str] = []
    length = 0

    def say(text: str) -> None:
        nonlocal length
        length += len(text)
        if length <= limit + 2:
            parts.append(text)

    yield from read_string(source, say)
    if length > limit + 2:  # not before its end: how much has come by now depends on how the text was split
        raise MalformedError
    found: str = json.loads("".join(parts))
    return found
