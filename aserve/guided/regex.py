"""Regular expressions: for whole outputs, and of JSON."""

from __future__ import annotations

import json
import re
from typing import Any

_SPECIAL = frozenset("\\.+*?()|[]{}^$")


def full_match(pattern: str) -> str:
    """The expression without the anchors that matching the whole output makes superfluous.

    Only where they stand for the whole expression: ``^a|b$`` keeps them, and a backend that cannot deal
    with anchors inside refuses it.
    """
    if "|" in pattern:
        return pattern
    if pattern.startswith("^"):
        pattern = pattern[1:]
    if pattern.endswith("$") and (len(pattern) - len(pattern[:-1].rstrip("\\"))) % 2 == 1:
        pattern = pattern[:-1]
    return pattern


def escape(text: str) -> str:
    """An expression that matches ``text`` alone, in the syntax that all backends share."""
    return "".join("\\" + each if each in _SPECIAL else each for each in text)


def one_of(texts: list[str]) -> str:
    return "(" + "|".join(map(escape, texts)) + ")"
