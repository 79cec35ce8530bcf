"""Schemas of calls, against the jsonschema package's idea of them."""

from __future__ import annotations

from typing import Any

import pytest

from aserve.server.openai.tools.schema import arguments_schema, calls_schema, depth_beyond

jsonschema = pytest.importorskip("jsonschema")

POINT = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "properties": {"at": {"$ref": "#/$defs/Place"}, "default": {"$ref": "#/$defs/Place"}},
    "required": ["at"],
    "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
}
OTHER = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/Place"}, "up": {"$ref": "#"}, "note": {"const": {"$ref": "#"}}},
    "$defs": {"Place": {"type": "string"}},
}


def valid(schema: dict[str, Any], value: Any) -> bool:
    jsonschema.Draft202012Validator.check_schema(schema)
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def test_references_hold_in_their_new_place() -> None:
    schema = calls_schema({"point": POINT, "other": OTHER, "clock": None}, parallel=True)
    good = [
        call("point", {"at": {"x": 1}, "default": {"x": 2}}),
        call("other", {"at": "here", "up": {"at": "there", "note": {"$ref": "#"}}}),
        call("clock", {}),
    ]
    assert valid(schema, good)
    for each in good:
        assert valid(schema, [each])
    for bad in (
        [],
        [call("point", {"at": "here"})],
        [call("point", {"at": {"x": 1}, "default": "here"})],
        [call("other", {"at": {"x": 1}})],
        [call("other", {"up": {"at": 5}})],
        [call("clock", {"more": 1})],
        [call("unknown", {})],
        [{"name": "clock"}],
        [{**call("clock", {}), "more": 1}],
    ):
        assert not valid(schema, bad), bad


def test_one_call_if_not_parallel() -> None:
    schema = calls_schema({"clock": None}, parallel=False)
    assert valid(schema, [call("clock", {})])
    assert not valid(schema, [call("clock", {})] * 2)


def test_arguments_are_objects_of_named_properties() -> None:
    for nothing in (None, {}):
        assert valid(arguments_schema(nothing), {})
        assert not valid(arguments_schema(nothing), {"a": 1})
    inner = {"type": "array", "items": {"type": "object", "properties": {"b": {}}}}
    schema = arguments_schema({"properties": {"a": inner}, "$schema": "x", "$id": "y"})
    assert valid(schema, {"a": [{"b": 1}]})
    assert not valid(schema, {"a": [{"c": 1}]})
    assert not valid(schema, {"c": 1})
    assert not valid(schema, [])
    # What the schema itself says about further properties holds.
    assert valid(arguments_schema({"properties": {}, "additionalProperties": {"type": "integer"}}), {"x": 1})
    combined = {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}
    assert valid(arguments_schema(combined), {"a": 1, "b": 1})


def test_definitions_and_alternatives_are_closed_where_that_is_sound() -> None:
    place = {"type": "object", "properties": {"row": {"type": "integer"}}}
    definitions = {"$defs": {"Place": place}}
    either = {"anyOf": [{"$ref": "#/$defs/Place", "description": "x"}, {"type": "null"}]}
    schema = arguments_schema({"properties": {"at": either, "enum": place}, **definitions})
    assert valid(schema, {"at": {"row": 1}, "enum": {"row": 2}})
    assert valid(schema, {"at": None})
    assert not valid(schema, {"at": {"row": 1, "more": 2}})
    assert not valid(schema, {"enum": {"more": 2}})
    cat = {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]}
    dog = {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]}
    tagged = arguments_schema(
        {"properties": {"pet": {"oneOf": [cat, dog], "discriminator": {"propertyName": "kind"}}}}
    )
    assert valid(tagged, {"pet": {"kind": "dog"}})
    assert not valid(tagged, {"pet": {"kind": "dog", "more": 1}})
    for whole in (
        {
            "properties": {"at": {"allOf": [{"$ref": "#/$defs/Place"}, {"properties": {"b": {}}}]}},
            **definitions,
        },
        {"properties": {"at": {"$ref": "#/$defs/Place", "properties": {"b": {}}}}, **definitions},
        {"properties": {"at": {"properties": {"b": {}}, "anyOf": [{"properties": {"row": {}}}]}}},
    ):
        assert valid(arguments_schema(whole), {"at": {"row": 1, "b": 2}})
    # What is closed must not let through what the schema refuses.
    exclusive = {"properties": {"x": {"oneOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}}}
    refused = {"properties": {"x": {"not": {"properties": {"a": {}}}}}}
    assert not valid(arguments_schema(exclusive), {"x": {"a": 1}})
    assert not valid(arguments_schema(refused), {"x": {"a": 1}})


def test_depth() -> None:
    value: Any = 1
    for levels in range(1, 2000):
        value = [value] if levels % 2 else {"x": value}
        if levels in (1, 2, 63, 64):
            assert not depth_beyond(value, 64)
    assert depth_beyond(value, 64)
    assert depth_beyond([[]], 1)
    assert not depth_beyond([], 1)
