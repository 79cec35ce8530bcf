"""JSON schemas of tools: how large they may be, and what guides the output to a call of one of them."""

from __future__ import annotations

from typing import Any

import orjson

from aserve.errors import InvalidRequestError

MAX_SCHEMA_BYTES = 128 * 1024
MAX_SCHEMA_DEPTH = 48
"""Of objects and lists in one another, so that a list of calls stays within what may guide an output. OpenAI
allows ten levels of objects in a strict schema."""

_CONJOINING = {
    "allOf", "not", "if", "dependentSchemas", "unevaluatedProperties", "patternProperties", "$dynamicRef",
}  # fmt: skip
_REMARKS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
_BY_NAME = {"properties", "$defs", "definitions", "patternProperties", "dependentSchemas"}
_DATA = {"enum", "const", "default", "examples"}


def checked_parameters(value: Any, place: str) -> dict[str, Any] | None:
    """A tool's ``parameters``; None for none. Raises InvalidRequestError naming ``place``.

    Whether it makes sense as a schema is found out if it has to guide an output.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{place} must be a JSON schema, that is an object", param="tools")
    if depth_beyond(value, MAX_SCHEMA_DEPTH):
        raise InvalidRequestError(f"{place} is nested deeper than {MAX_SCHEMA_DEPTH} levels", param="tools")
    if len(orjson.dumps(value)) > MAX_SCHEMA_BYTES:
        raise InvalidRequestError(f"{place} is larger than {MAX_SCHEMA_BYTES} bytes", param="tools")
    if value.get("type", "object") != "object":
        raise InvalidRequestError(f'{place}.type must be "object": arguments have names', param="tools")
    return value


def depth_beyond(value: Any, limit: int) -> bool:
    """Whether objects and lists are nested deeper than ``limit``; takes no stack."""
    level = [value]
    for _ in range(limit):
        following: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                following += each.values()
            elif isinstance(each, list):
                following += each
        if not following:
            return False
        level = following
    return any(isinstance(each, (dict, list)) for each in level)


def arguments_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """What guides the arguments of a tool: its schema, for an object, without what it does not name.

    Narrower than the schema where that leaves open whether further properties are allowed: a model that
    has to write something would otherwise make them up. Not so where parts of the schema hold together,
    as with ``allOf``: one may be about what another names.
    """
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    own = {key: value for key, value in parameters.items() if key not in ("$schema", "$id")}
    schema = {"type": "object", **own}
    return schema if _conjoins(schema) else _closed(schema)


def calls_schema(tools: dict[str, dict[str, Any] | None], *, parallel: bool) -> dict[str, Any]:
    """What guides the output to a list of calls: ``[{"name": ..., "arguments": {...}}, ...]``.

    tools: parameters by name. References inside of their schemas are made to hold in the new place.
    """
    calls = []
    definitions: dict[str, Any] = {}
    for number, (name, parameters) in enumerate(tools.items()):
        arguments = arguments_schema(parameters)
        moved = _moved(arguments, f"#/$defs/{number}")
        if moved != arguments:
            definitions[str(number)] = moved
            arguments = {"$ref": f"#/$defs/{number}"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"type": "string", "enum": [name]}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    found: dict[str, Any] = {
        "type": "array",
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "minItems": 1,
    }
    if not parallel:
        found["maxItems"] = 1
    if definitions:
        found["$defs"] = definitions
    return found


def _parts(schema: Any, by_name: bool) -> list[tuple[str, Any, bool]]:
    """What a schema, or a map from names to schemas, is made of: key, part, and whether that is a map."""
    if not isinstance(schema, dict):
        return []
    if by_name:
        return [(key, value, False) for key, value in schema.items()]
    return [(key, value, key in _BY_NAME) for key, value in schema.items() if key not in _DATA]


def _conjoins(schema: Any, by_name: bool = False) -> bool:
    """Whether some value has to fit more than one schema, or no more than one."""
    if isinstance(schema, list):
        return any(_conjoins(each) for each in schema)
    if isinstance(schema, dict) and not by_name:
        keys = schema.keys()
        alone = keys - _REMARKS
        if (
            keys & _CONJOINING
            or ("$ref" in keys and alone != {"$ref"})
            or ("anyOf" in keys and "properties" in keys)
        ):
            return True
        if "oneOf" in keys and ("discriminator" not in keys or "properties" in keys):
            return True
    return any(_conjoins(part, is_map) for _, part, is_map in _parts(schema, by_name))


def _closed(schema: dict[str, Any], by_name: bool = False) -> dict[str, Any]:
    """``schema`` without properties that it does not name, wherever it does not speak of them."""
    found = dict(schema)
    for key, part, is_map in _parts(schema, by_name):
        if isinstance(part, dict):
            found[key] = _closed(part, is_map)
        elif isinstance(part, list):
            found[key] = [_closed(each) if isinstance(each, dict) else each for each in part]
    if not by_name and isinstance(schema.get("properties"), dict):
        found.setdefault("additionalProperties", False)
    return found


def _moved(schema: Any, place: str, by_name: bool = False) -> Any:
    """``schema`` with references into itself pointing below ``place``.

    by_name: it is a map from names to schemas instead.
    """
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if by_name:
            found[key] = _moved(value, place)
        elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
            found[key] = place + value[1:]
        else:
            found[key] = value if key in _DATA else _moved(value, place, key in _BY_NAME)
    return found
