"""JSON schemas as regular expressions, for backends that know nothing else.

What comes out matches only JSON that is valid under the schema, though not all of it: properties keep
their order, undeclared ones are left out, recursion ends after a few levels. A keyword that cannot be
honoured is refused by name. The meaning of keywords is that of JSON Schema 2020-12.
"""

from __future__ import annotations

import json
from typing import Any

from aserve.guided.base import GrammarError
from aserve.guided.regex import escape, full_match

MAX_EXPRESSION = 256 << 10
"""Longest expression made; nested alternatives multiply."""

MAX_RECURSION = 3
"""How often a definition may be inside itself."""

MAX_RANGE = 1024
"""Most integers of a bounded range: they are listed."""

_CHARACTER = r'([^"\\\x00-\x1F\x7F-\x9F]|\\["\\/bfnrt])'
_STRING = f'"{_CHARACTER}*"'
_INTEGER = "-?(0|[1-9][0-9]{0,15})"
_NUMBER = rf"{_INTEGER}(\.[0-9]{{1,15}})?([eE][+-]?[0-9]{{1,2}})?"
_DATE = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}

_ANNOTATIONS = frozenset(("title", "description", "default", "examples", "example", "deprecated"))
_ANNOTATIONS |= {"readOnly", "writeOnly", "$schema", "$id", "$comment", "$defs", "definitions"}
_OF_TYPE: dict[str, frozenset[str]] = {
    "string": frozenset(("minLength", "maxLength", "pattern", "format")),
    "integer": frozenset(("minimum", "maximum")),
    "number": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "object": frozenset(("properties", "required", "additionalProperties", "maxProperties")),
}
_KNOWN = _ANNOTATIONS.union(("type", "enum", "const", "anyOf", "$ref"), *_OF_TYPE.values())


def schema_expression(text: str, whitespace: str) -> str:
    """A regular expression of JSON that is valid under the schema ``text``.

    whitespace: expression of what may stand between JSON's tokens. Raises GrammarError.
    """
    root = json.loads(text)
    found = _Converter(root, f"({whitespace})" if whitespace else "").convert(root)
    if found is None:
        raise GrammarError("describes no value, or only values that are nested without end")
    return found


class _Converter:
    """``None`` stands for "no value" throughout."""

    def __init__(self, root: Any, whitespace: str) -> None:
        self._root = root
        self._ws = whitespace
        self._comma = f"{whitespace},{whitespace}"
        self._active: list[str] = []
        self._budget = 20_000

    def convert(self, schema: Any) -> str | None:
        self._budget -= 1
        if self._budget < 0:
            raise GrammarError("is too large for this backend")
        if isinstance(schema, bool):
            return self._any(1) if schema else None
        if not isinstance(schema, dict):
            raise GrammarError("must consist of objects and booleans wherever a schema belongs")
        for keyword in schema:
            if keyword not in _KNOWN:
                raise GrammarError(f"uses the keyword {keyword[:64]!r}, which this backend does not support")
        for alone in ("$ref", "anyOf"):
            if alone in schema:
                self._check_beside(schema, {alone})
                if alone == "$ref":
                    return self._reference(schema["$ref"])
                return _union([self.convert(each) for each in _list(schema, "anyOf")])
        names = _types(schema)
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else _list(schema, "enum")
            self._check_beside(schema, {"const", "enum", "type"})
            return _union([_literal(each) for each in values if names is None or _type_of(each) & names])
        constraints = schema.keys() - _ANNOTATIONS - {"type"}
        if names is None:
            # Keywords of a type say nothing about other types; to allow that type alone is valid too.
            names = {name for name, own in _OF_TYPE.items() if own & constraints}
            if not names:
                return self._any(1)
        unused = constraints.difference(*(_OF_TYPE[name] for name in names))
        if unused:
            raise GrammarError(f"uses the keyword {min(unused)!r} where the type does not have it")
        found = _union([self._typed(name, schema) for name in _OF_TYPE if name in names])
        if found is not None and len(found) > MAX_EXPRESSION:
            raise GrammarError("is too large for this backend")
        return found

    def _check_beside(self, schema: dict[str, Any], known: set[str]) -> None:
        others = schema.keys() - _ANNOTATIONS - known
        if others:
            raise GrammarError(
                f"uses {min(others)!r} beside {min(known & schema.keys())!r}: not supported by this backend"
            )

    def _typed(self, name: str, schema: dict[str, Any]) -> str | None:
        if name == "string":
            return _string(schema)
        if name == "integer":
            return _integer(schema)
        if name == "array":
            return self._array(schema)
        if name == "object":
            return self._object(schema)
        return {"number": _NUMBER, "boolean": "(true|false)", "null": "null"}[name]

    def _reference(self, reference: Any) -> str | None:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise GrammarError("may only refer ($ref) to its own parts, by #/...")
        if self._active.count(reference) >= MAX_RECURSION:
            return None
        found = self._root
        for part in reference.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or key not in found:
                raise GrammarError(f"refers to {reference[:64]!r}, which it does not contain")
            found = found[key]
        self._active.append(reference)
        try:
            return self.convert(found)
        finally:
            self._active.pop()

    def _any(self, depth: int) -> str:
        scalars = [_STRING, _NUMBER, "true", "false", "null"]
        if depth:
            inner = self._any(depth - 1)
            scalars += [self._items(inner, 0, None), self._map(inner, None)]
        return f"({'|'.join(scalars)})"

    def _items(self, item: str, least: int, most: int | None) -> str:
        if most is not None and most < max(least, 1):
            return rf"\[{self._ws}\]"
        more = f"({self._comma}{item}){_times(max(least - 1, 0), None if most is None else most - 1)}"
        body = f"{item}{more}" if least else f"({item}{more})?"
        return rf"\[{self._ws}{body}{self._ws}\]"

    def _array(self, schema: dict[str, Any]) -> str | None:
        least, most = _count(schema, "minItems") or 0, _count(schema, "maxItems")
        first = [self.convert(each) for each in _list(schema, "prefixItems")]
        rest = self.convert(schema.get("items", True))
        if None in first:
            first, rest = first[: first.index(None)], None
        if rest is None:
            most = len(first) if most is None else min(most, len(first))
        if most is not None and least > most:
            return None
        if not first:
            return self._items(rest or "", least, most)
        options = [
            rf"\[{self._ws}{self._comma.join(str(each) for each in first[:count])}{self._ws}\]"
            for count in range(least, min(len(first), len(first) if most is None else most) + 1)
        ]
        if rest is not None and (most is None or most > len(first)):
            times = _times(max(least - len(first), 1), None if most is None else most - len(first))
            head = self._comma.join(str(each) for each in first)
            options.append(rf"\[{self._ws}{head}({self._comma}{rest}){times}{self._ws}\]")
        return _union(list(options))

    def _map(self, value: str, most: int | None) -> str:
        pair = f"{_STRING}{self._ws}:{self._ws}{value}"
        if most == 0:
            return rf"\{{{self._ws}\}}"
        more = f"({self._comma}{pair}){_times(0, None if most is None else most - 1)}"
        return rf"\{{{self._ws}({pair}{more})?{self._ws}\}}"

    def _object(self, schema: dict[str, Any]) -> str | None:
        properties = schema.get("properties", {})
        required = _list(schema, "required")
        additional = schema.get("additionalProperties", True)
        most = _count(schema, "maxProperties")
        if not isinstance(properties, dict) or not all(isinstance(each, str) for each in required):
            raise GrammarError("must have an object of properties, and a list of required names")
        if not properties and not required:
            value = self.convert(additional)
            return self._map(value or "", 0 if value is None else most)
        wanted = dict(properties) | {name: additional for name in required if name not in properties}
        if most is not None and most < len(wanted):
            raise GrammarError("uses maxProperties below the number of properties: not supported")
        parts: list[tuple[str, bool]] = []
        for name, each in wanted.items():
            value = self.convert(each)
            if value is not None:
                key = _literal(name)
                parts.append((f"{key}{self._ws}:{self._ws}{value}", name in required))
            elif name in required:
                return None
        return rf"\{{{self._ws}{self._members(parts)}{self._ws}\}}"

    def _members(self, parts: list[tuple[str, bool]]) -> str:
        """Members in order, each required or not, and the commas between those that are there."""
        first = next((place for place, (_, needed) in enumerate(parts) if needed), None)
        if first is not None:
            before = "".join(f"({part}{self._comma})?" for part, _ in parts[:first])
            return before + parts[first][0] + self._followers(parts[first + 1 :])
        options = [part + self._followers(parts[place + 1 :]) for place, (part, _) in enumerate(parts)]
        if sum(map(len, options)) > MAX_EXPRESSION:
            raise GrammarError("is too large for this backend: it has too many optional properties")
        return f"({'|'.join(options)})?" if options else ""

    def _followers(self, parts: list[tuple[str, bool]]) -> str:
        return "".join(f"({self._comma}{part}){'' if needed else '?'}" for part, needed in parts)


def _union(options: list[str | None]) -> str | None:
    found = list(dict.fromkeys(each for each in options if each is not None))
    if len(found) < 2:
        return found[0] if found else None
    return f"({'|'.join(found)})"


def _literal(value: Any) -> str:
    return escape(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def _types(schema: dict[str, Any]) -> set[str] | None:
    kinds = schema.get("type")
    if kinds is None:
        return None
    names = {kinds} if isinstance(kinds, str) else set(_list(schema, "type"))
    if not names or not names <= _OF_TYPE.keys():
        raise GrammarError(f"must use the types {', '.join(_OF_TYPE)}")
    return names


def _type_of(value: Any) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return {"integer", "number"}
    kinds: dict[type, str] = {float: "number", str: "string", type(None): "null", list: "array"}
    return {kinds.get(type(value), "object")}


def _list(schema: dict[str, Any], keyword: str) -> list[Any]:
    found = schema.get(keyword, [])
    if not isinstance(found, list):
        raise GrammarError(f"must have a list at the keyword {keyword!r}")
    return found


def _count(schema: dict[str, Any], keyword: str) -> int | None:
    found = schema.get(keyword)
    if found is None:
        return None
    if not isinstance(found, (int, float)) or isinstance(found, bool) or found < 0 or found != int(found):
        raise GrammarError(f"must have a count at the keyword {keyword!r}")
    if found > 10_000:
        raise GrammarError(f"uses the keyword {keyword!r} with a count that is too large for this backend")
    return int(found)


def _times(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


def _integer(schema: dict[str, Any]) -> str | None:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None and high is None:
        return _INTEGER
    whole = all(isinstance(each, int) and not isinstance(each, bool) for each in (low, high))
    if not whole or low is None or high is None or high - low >= MAX_RANGE:
        raise GrammarError(
            f"uses minimum or maximum: this backend supports whole ones, together, up to {MAX_RANGE} apart"
        )
    return _union([str(each) for each in range(low, high + 1)])


def _string(schema: dict[str, Any]) -> str | None:
    least, most = _count(schema, "minLength") or 0, _count(schema, "maxLength")
    if most is not None and least > most:
        return None
    inner = [schema[keyword] for keyword in ("pattern", "format") if keyword in schema]
    if not inner:
        return f'"{_CHARACTER}{_times(least, most)}"' if least or most is not None else _STRING
    if len(inner) > 1 or least or most is not None:
        raise GrammarError("uses pattern or format beside another bound of a string: not supported")
    if "format" in schema:
        if inner[0] not in _FORMATS:
            known = ", ".join(_FORMATS)
            raise GrammarError(f"uses a format that this backend does not support; it has {known}")
        return f'"{_FORMATS[inner[0]]}"'
    if not isinstance(inner[0], str):
        raise GrammarError("must have a string at the keyword 'pattern'")
    return f'"({_inside_quotes(full_match(inner[0]))})"'


_FORBIDDEN = r'"\\\x00-\x1F\x7F-\x9F'
_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_", "s": " "}


def _inside_quotes(pattern: str) -> str:
    """The expression as far as it matches text that JSON writes without escapes."""
    refused = GrammarError("uses a pattern with anchors, look-around, quotes or escapes this backend lacks")
    out: list[str] = []
    in_class = escaped = False
    for at, this in enumerate(pattern):
        if escaped:
            escaped = False
            if this in _CLASSES:
                out.append(_CLASSES[this] if in_class else f"[{_CLASSES[this]}]")
            elif this.isalnum() or this in '"\\':
                raise refused
            else:
                out.append(this if this == " " else f"\\{this}")
        elif this == "\\":
            escaped = True
        elif this == '"' or ord(this) < 32:
            raise refused
        elif in_class:
            if this == "]":
                in_class = False
            out.append(f"^{_FORBIDDEN}" if this == "^" and pattern[at - 1] == "[" else this)
        elif this in "^$" or (pattern.startswith("(?", at) and not pattern.startswith("(?:", at)):
            raise refused
        else:
            in_class = this == "["
            out.append(f"[^{_FORBIDDEN}]" if this == "." else this)
    if escaped or in_class:
        raise refused
    return "".join(out)
