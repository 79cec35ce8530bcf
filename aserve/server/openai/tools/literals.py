"""Python's literals as they come, handed on as JSON: strings, numbers, words, lists, tuples and dicts.

JSON's own words are taken as well. Bytes, sets, joined strings and expressions, a value in brackets among
them, raise MalformedError. Source: "Lexical analysis" in the Python language reference.
"""

from __future__ import annotations

import json
import re

from aserve.server.openai.tools.json_text import MAX_DEPTH, MAX_NUMBER, Say
from aserve.server.openai.tools.source import MalformedError, Reading, Source

_PLAIN = {quote: re.compile(rf"[^{quote}\\\n\r]+") for quote in "'\""}
_WORD = re.compile(r"[A-Za-z]+")
_IN_NUMBERS = re.compile(r"[-+.0-9eE_]+")
_NUMBER = re.compile(r"(-?)\+?(\d+(?:_\d+)*)?(?:\.(\d+(?:_\d+)*)?)?(?:[eE]([+-]?\d+))?", re.ASCII)
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_LONE = "(1"
"""A bracket that holds one value and, so far, no comma: only the comma makes it a tuple."""
_CLOSING = {"[": "]", "(": ")", _LONE: ")", "{": "}"}
_SIMPLE = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}
_SIMPLE |= {character: character for character in "\\'\""} | {"\n": ""}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


def read_literal(source: Source, say: Say) -> Reading[None]:
    """Takes one literal, with the space before it."""
    open_brackets: list[str] = []
    while True:
        # Here a value is due.
        character = yield from source.after_space()
        if character in _CLOSING:
            if len(open_brackets) == MAX_DEPTH:
                raise MalformedError
            source.at += 1
            open_brackets.append(character)
            say("{" if character == "{" else "[")
            if (yield from source.after_space()) != _CLOSING[character]:
                if character == "{":
                    yield from _key(source, say)
                elif character == "(":
                    open_brackets[-1] = _LONE
                continue
        elif character in "'\"":
            yield from _string(source, say)
        elif character in "-+." or "0" <= character <= "9":
            say((yield from _number(source)))
        else:
            word = _WORDS.get((yield from source.run(_WORD, 5)))
            if word is None:
                raise source.fault()
            say(word)
        # Here a value has just ended, or a bracket that holds nothing is about to.
        while open_brackets:
            character = yield from source.after_space()
            if character == _CLOSING[open_brackets[-1]]:
                if open_brackets[-1] == _LONE:
                    raise MalformedError
                source.at += 1
                say("}" if open_brackets.pop() == "{" else "]")
            elif character == ",":
                source.at += 1
                if open_brackets[-1] == _LONE:
                    open_brackets[-1] = "("
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
    if (yield from source.after_space()) in "'\"":
        yield from _string(source, say)
    else:
        say(json.dumps((yield from _number(source))))
    if (yield from source.after_space()) != ":":
        raise MalformedError
    source.at += 1
    say(":")


def _number(source: Source) -> Reading[str]:
    written = yield from source.run(_IN_NUMBERS, MAX_NUMBER)
    match = _NUMBER.fullmatch(written)
    if match is None or not (match[2] or match[3]):
        raise source.fault()
    sign, whole, fraction, exponent = match.groups("")
    number = sign + (whole.replace("_", "").lstrip("0") or "0")
    if "." in written:
        number += "." + (fraction.replace("_", "") or "0")
    return number + (f"e{exponent}" if exponent else "")


def _string(source: Source, say: Say) -> Reading[None]:
    """Takes a string in one quote or in three."""
    quote = source.text[source.at]
    source.at += 1
    say('"')
    if (yield from source.peek()) == quote:
        source.at += 1
        if (yield from source.more()) and source.text[source.at] == quote:
            source.at += 1
            yield from _long_string(source, say, quote)
        say('"')
        return
    plain = _PLAIN[quote]
    while True:
        match = plain.match(source.text, source.at)
        if match is not None:
            say(_inside(match[0]))
            source.at = match.end()
        character = yield from source.peek()
        if character == quote:
            source.at += 1
            say('"')
            return
        if character == "\\":
            source.at += 1
            yield from _escape(source, say)
        elif character in "\r\n":  # which Python would not take, and models write
            source.at += 1
            say(_inside(character))


def _long_string(source: Source, say: Say, quote: str) -> Reading[None]:
    quotes = 0
    while True:
        character = yield from source.peek()
        if character == quote:
            source.at += 1
            quotes += 1
            if quotes == 3:
                return
            continue
        if quotes:
            say(_inside(quote * quotes))
            quotes = 0
        if character == "\\":
            source.at += 1
            yield from _escape(source, say)
            continue
        match = _PLAIN[quote].match(source.text, source.at)
        text = character if match is None else match[0]
        source.at += len(text)
        say(_inside(text))


def _escape(source: Source, say: Say) -> Reading[None]:
    character = yield from source.peek()
    if character in _HEX_DIGITS:
        source.at += 1
        digits = ""
        while len(digits) < _HEX_DIGITS[character]:
            digit = yield from source.peek()
            if digit not in "0123456789abcdefABCDEF":
                raise MalformedError
            source.at += 1
            digits += digit
        code = int(digits, 16)
        if code > 0x10FFFF:
            raise MalformedError
        say(f"\\u{code:04x}" if 0xD800 <= code < 0xE000 else _inside(chr(code)))
    elif character in _SIMPLE:
        source.at += 1
        say(_inside(_SIMPLE[character]))
    else:
        say("\\\\")  # Python too leaves escapes it does not know as they are


def _inside(text: str) -> str:
    """``text`` as it is written inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
