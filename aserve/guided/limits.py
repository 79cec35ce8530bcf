"""Bounds on a guide that are checked before anything works on it."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Any

from aserve.messages.params import GuidedParams

MAX_BYTES = {"json": 256 << 10, "regex": 16 << 10, "choice": 256 << 10, "grammar": 128 << 10}
"""Longest text of a guide by its kind."""

MAX_CHOICES = 4096
MAX_WHITESPACE_PATTERN = 256
MAX_DEPTH = 64
"""Deepest nesting of a schema's JSON, and of the brackets of an expression or a grammar."""


def check(guided: GuidedParams) -> None:
    """Raises InvalidRequestError for a guide that is too large, nested too deep, or not what it says."""
    kind, text = guided.kind, guided.text
    if kind == "json_object":
        size = 0
    else:
        size = len(text) if text.isascii() else len(text.encode())
        if size > MAX_BYTES[kind]:
            raise guided.refusal(kind, f"must be at most {MAX_BYTES[kind]} bytes, got {size}")
    if len(guided.whitespace_pattern or "") > MAX_WHITESPACE_PATTERN:
        raise guided.refusal(
            "whitespace_pattern", f"must be at most {MAX_WHITESPACE_PATTERN} characters long"
        )
    if kind == "choice" and len(guided.choice or ()) > MAX_CHOICES:
        raise guided.refusal("choice", f"must hold at most {MAX_CHOICES} strings")
    # Before json.loads, which is recursive; escapes and text in quotes are at worst counted as nesting.
    if kind in ("json", "regex", "grammar") and _depth(text, in_json=kind == "json") > MAX_DEPTH:
        raise guided.refusal(kind, f"must not be nested deeper than {MAX_DEPTH} levels")
    if kind == "json":
        try:
            schema: Any = json.loads(text)
        except ValueError as error:
            raise guided.refusal("json", f"is not valid JSON: {error}") from None
        if not isinstance(schema, (dict, bool)):
            raise guided.refusal("json", "must be a JSON schema: an object")


_ESCAPED = re.compile(r"\\.?", re.DOTALL)
_QUOTED = re.compile(r'"[^"]*"?')
_NO_BRACKET = re.compile(r"[^][(){}]+")
_STEPS = dict.fromkeys("([{", 1) | dict.fromkeys(")]}", -1)


def _depth(text: str, *, in_json: bool) -> int:
    """How deep brackets are within each other. In the event loop, so not a loop over a long text."""
    text = _ESCAPED.sub("", text)
    if in_json:
        text = _QUOTED.sub("", text)
    return max(accumulate(map(_STEPS.__getitem__, _NO_BRACKET.sub("", text))), default=0)
