"""Guides as regular expressions."""

from __future__ import annotations

import json

from aserve.guided.base import DEFAULT_WHITESPACE, GrammarError, GuideSpec
from aserve.guided.regex import full_match, one_of
from aserve.guided.schema import schema_expression


def expression_of(spec: GuideSpec) -> str:
    """The expression that matches the outputs ``spec`` asks for. Raises GrammarError if there is none."""
    if spec.kind == "regex":
        return full_match(spec.text)
    if spec.kind == "choice":
        return one_of(json.loads(spec.text))
    if spec.kind in ("json", "json_object"):
        whitespace = DEFAULT_WHITESPACE if spec.whitespace_pattern is None else spec.whitespace_pattern
        return schema_expression(spec.text or '{"type": "object"}', whitespace)
    raise GrammarError(f"cannot be written as a regular expression: {spec.kind}")
