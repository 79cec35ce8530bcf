"""Thirty JSON schemas of the kinds that applications send, by name."""

from __future__ import annotations

from typing import Any

_ADDRESS = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "maxLength": 30},
        "city": {"type": "string", "maxLength": 20},
        "country": {"enum": ["CH", "DE", "FR", "IN", "US"]},
        "postcode": {"type": "string", "pattern": "^[0-9]{4,6}$"},
    },
    "required": ["street", "city", "country"],
    "additionalProperties": False,
}


def _object(properties: dict[str, Any], required: list[str] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
        **more,
    }


_TEXT = {"type": "string", "maxLength": 20}
_FLAG = {"type": "boolean"}
_WHOLE = {"type": "integer"}

SCHEMAS: dict[str, dict[str, Any]] = {
    "answer": _object({"answer": {"type": "string", "maxLength": 40}}),
    "verdict": _object({"verdict": {"enum": ["yes", "no", "unsure"]}, "sure": _FLAG}),
    "person": _object({"name": _TEXT, "age": _WHOLE, "email": _TEXT}, ["name", "age"]),
    "address": _ADDRESS,
    "weather_call": _object({"location": _TEXT, "unit": {"enum": ["celsius", "fahrenheit"]}}, ["location"]),
    "named_call": _object(
        {"name": {"const": "search"}, "arguments": _object({"query": _TEXT, "limit": _WHOLE}, ["query"])}
    ),
    "either_call": {
        "anyOf": [
            _object({"name": {"const": "add"}, "arguments": _object({"a": _WHOLE, "b": _WHOLE})}),
            _object({"name": {"const": "say"}, "arguments": _object({"text": _TEXT})}),
        ]
    },
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 1, "maxItems": 4},
    "scores": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3},
    "matrix": {
        "type": "array",
        "items": {"type": "array", "items": _WHOLE, "minItems": 2, "maxItems": 2},
        "minItems": 2,
        "maxItems": 2,
    },
    "point": {
        "type": "array",
        "prefixItems": [{"type": "number"}, {"type": "number"}, {"type": "string", "maxLength": 5}],
        "items": False,
        "minItems": 3,
        "maxItems": 3,
    },
    "invoice": _object(
        {
            "number": {"type": "string", "pattern": "^INV-[0-9]{4}$"},
            "lines": {
                "type": "array",
                "items": _object({"item": _TEXT, "count": _WHOLE, "price": {"type": "number"}}),
                "minItems": 1,
                "maxItems": 2,
            },
            "paid": _FLAG,
        }
    ),
    "customer": {
        "$defs": {"address": _ADDRESS},
        **_object({"name": _TEXT, "home": {"$ref": "#/$defs/address"}}),
    },
    "shipment": {
        "definitions": {"place": _object({"city": _TEXT, "code": {"enum": ["ZRH", "JFK", "NRT"]}})},
        **_object({"origin": {"$ref": "#/definitions/place"}, "target": {"$ref": "#/definitions/place"}}),
    },
    "nullable": _object(
        {"note": {"anyOf": [_TEXT, {"type": "null"}]}, "rank": {"type": ["integer", "null"]}}
    ),
    "sentiment": _object({"label": {"enum": ["good", "bad"]}, "score": {"type": "number"}}),
    "unicode": _object({"größe": _WHOLE, "城市": _TEXT}),
    "quotes": {"enum": ['a "quoted" word', "back\\slash", "line\nbreak", "tab\t", "é", 7, -1.5, True, None]},
    "colour": _object({"hex": {"type": "string", "pattern": "^#[0-9a-f]{6}$"}}),
    "phone": _object({"phone": {"type": "string", "pattern": "^\\+[0-9]{1,3} [0-9]{6,10}$"}}),
    "password": _object({"password": {"type": "string", "minLength": 8, "maxLength": 12}}),
    "nested": _object({"a": _object({"b": _object({"c": _object({"d": _FLAG})})})}),
    "options": _object({name: _FLAG for name in "abcdef"}, ["a"]),
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 4},
    "tree": {
        "$defs": {
            "node": _object(
                {
                    "value": _WHOLE,
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                ["value"],
            )
        },
        "$ref": "#/$defs/node",
    },
    "rating": _object({"stars": {"type": "integer", "minimum": 1, "maximum": 5}, "text": _TEXT}),
    "share": _object({"share": {"type": "number", "minimum": 0, "maximum": 1}}),
    "event": _object(
        {
            "day": {"type": "string", "format": "date"},
            "id": {"type": "string", "format": "uuid"},
            "title": _TEXT,
        }
    ),
    "geometry": {
        "anyOf": [
            _object(
                {
                    "type": {"const": "Point"},
                    "coordinates": {
                        "type": "array",
                        "items": {"type": "number"},
                        "minItems": 2,
                        "maxItems": 2,
                    },
                }
            ),
            _object({"type": {"const": "Circle"}, "radius": {"type": "number", "exclusiveMinimum": 0}}),
        ]
    },
    "merged": {
        "allOf": [
            {"type": "object", "properties": {"id": _WHOLE}, "required": ["id"]},
            {"type": "object", "properties": {"name": _TEXT}, "required": ["name"]},
        ],
    },
}


def large_schema(size: int = 5000) -> dict[str, Any]:
    """A schema of at least ``size`` bytes, as a tool with many arguments has."""
    import json

    properties: dict[str, Any] = {}
    kinds = list(SCHEMAS.values())
    picked = [kinds[i] for i in (1, 2, 3, 7, 11, 15, 18, 20)]
    while len(json.dumps(properties)) < size:
        index = len(properties)
        properties[f"argument_{index}"] = picked[index % len(picked)] | {"description": f"argument {index}"}
    return _object(properties, list(properties)[:4])
