"""Regular expressions: for whole outputs, and of JSON."""

from __future__ import annotations

_SPECIAL = frozenset("\\.+*?()|[]{}^$")


def full_match(pattern: str) -> str:
    r"""The expression without the anchors that matching the whole output makes superfluous.

    ``\d`` means the digits 0 to 9, whichever of Unicode's others a backend knows. Anchors go only
    where they stand for the whole expression: ``^a|b$`` keeps them, and a backend that cannot deal
    with anchors inside refuses it.
    """
    pattern = _plain_digits(pattern)
    if _has_alternatives(pattern):
        return pattern
    if pattern.startswith("^"):
        pattern = pattern[1:]
    if pattern.endswith("$") and (len(pattern) - len(pattern[:-1].rstrip("\\"))) % 2 == 1:
        pattern = pattern[:-1]
    return pattern


def _plain_digits(pattern: str) -> str:
    out: list[str] = []
    escaped = in_class = False
    for character in pattern:
        if escaped:
            escaped = False
            digits = "0-9" if in_class else "[0-9]"
            out.append(digits if character == "d" else "\\" + character)
        elif character == "\\":
            escaped = True
        else:
            in_class = character == "[" or (in_class and character != "]")
            out.append(character)
    return "".join(out) + "\\" * escaped


def _has_alternatives(pattern: str) -> bool:
    """Whether there is a ``|`` outside all brackets."""
    depth = 0
    escaped = in_class = False
    for character in pattern:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif in_class:
            in_class = character != "]"
        elif character == "|" and depth == 0:
            return True
        else:
            in_class = character == "["
            depth += (character == "(") - (character == ")")
    return False


def escape(text: str) -> str:
    """An expression that matches ``text`` alone, in the syntax that all backends share."""
    return "".join("\\" + each if each in _SPECIAL else each for each in text)


def one_of(texts: list[str]) -> str:
    return "(" + "|".join(map(escape, texts)) + ")"
