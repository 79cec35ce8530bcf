"""Bounds on a guide that are checked before anything works on it."""

from __future__ import annotations

import json
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


def _depth(text: str, *, in_json: bool) -> int:
    deepest = depth = 0
    quoted = escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif in_json and character == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest
