"""What bodies' fields hold where their types in the code say less, for the OpenAPI document.

They are told apart by hand there, for speed or because their meaning depends on one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aserve.server.openapi_answers import (
    BOOLEAN,
    NULL,
    NUMBER,
    STRING,
    Schema,
    constant,
    list_of,
    one_of,
    or_null,
    record,
)

_ID: Schema = {"type": "integer", "minimum": 0}
_TEXT: Schema = {"type": "string", "minLength": 1}
_OBJECT: Schema = {"type": "object"}
_NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_.:/-]{1,128}$"}
_IDS = list_of(_ID, minItems=1)

_PROMPTS = {"anyOf": [_TEXT, list_of(_TEXT, minItems=1), _IDS, list_of(_IDS, minItems=1)]}

_DESCRIBED = {"description": or_null(STRING), "parameters": or_null(_OBJECT), "strict": or_null(BOOLEAN)}
_FUNCTION = record(_DESCRIBED, name=_NAME)
_TOOL = record(type=constant("function"), function=_FUNCTION)
_NAMED = record(type=constant("function"), function=record(name=_NAME))
_ALLOWED = record(
    type=constant("allowed_tools"),
    allowed_tools=record(mode=one_of("auto", "required"), tools=list_of(_NAMED, minItems=1)),
)
_CALL = record(
    {"id": or_null(STRING), "type": constant("function")},
    function=record({"arguments": or_null(STRING, _OBJECT)}, name=_TEXT),
)
_PART = {
    "anyOf": [
        record(type=constant("text"), text=STRING),
        record(type=constant("refusal"), refusal=STRING),
    ]
}
_RANGES: dict[str, Schema] = {
    "n": {"minimum": 1},
    "best_of": {"minimum": 1},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 2},
    "temperature": {"minimum": 0},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1, "not": {"const": 0}},
    "min_p": {"minimum": 0, "maximum": 1},
    "min_tokens": {"minimum": 0},
    "max_tokens": {"minimum": 0},
    "max_completion_tokens": {"minimum": 1},
    "max_output_tokens": {"minimum": 1},
    "priority": {"minimum": -(2**31), "maximum": 2**31 - 1},
    "timeout": {"exclusiveMinimum": 0},
}
"""Of numbers, in whichever body they are."""

_GUIDES = {
    "guided_json": {"anyOf": [_TEXT, _OBJECT]},
    "guided_regex": _TEXT,
    "guided_choice": list_of(_TEXT, minItems=1),
    "guided_grammar": _TEXT,
}
_BIAS = {"type": "object", "propertyNames": {"pattern": "^[0-9]{1,20}$"}, "additionalProperties": NUMBER}
_EMPTY: Schema = {"enum": [None, False, 0, "", [], {}]}
"""Of fields for what is not to be had here."""

_RESPONSE_PART = {
    "anyOf": [
        record(type=one_of("input_text", "output_text", "text"), text=STRING),
        record(type=constant("refusal"), refusal=STRING),
    ]
}
_RESPONSE_CONTENT = {"anyOf": [STRING, list_of(_RESPONSE_PART)]}
_RESPONSE_ITEM = {
    "anyOf": [
        record({"type": or_null(constant("message"))}, role=STRING, content=_RESPONSE_CONTENT),
        record(type=constant("function_call"), call_id=STRING, name=_TEXT, arguments=STRING),
        record(type=constant("function_call_output"), call_id=STRING, output=_RESPONSE_CONTENT),
        record(type=constant("reasoning")),
    ]
}
_RESPONSE_NAMED = record(type=constant("function"), name=_NAME)
_RESPONSE_CHOICE = {
    "anyOf": [
        one_of("none", "auto", "required"),
        _RESPONSE_NAMED,
        record(
            type=constant("allowed_tools"),
            mode=one_of("auto", "required"),
            tools=list_of(_RESPONSE_NAMED, minItems=1),
        ),
    ]
}
_RESPONSE_TOOL = {
    "anyOf": [
        record(_DESCRIBED, type=constant("function"), name=_NAME),
        # Left out: the server would have to run it.
        {"type": "object", "properties": {"type": {"not": constant("function")}}},
    ]
}
_TEXT_FORMAT = {
    "anyOf": [
        record(type=one_of("text", "json_object")),
        record(
            {
                "name": or_null(STRING),
                "description": or_null(STRING),
                "schema": or_null(_OBJECT),
                "strict": or_null(BOOLEAN),
            },
            type=constant("json_schema"),
        ),
    ]
}

_BLOCK_TEXT = record(type=constant("text"), text=STRING)
_BLOCKS_TEXT = {"anyOf": [STRING, list_of(_BLOCK_TEXT)]}
_BLOCK = {
    "anyOf": [
        _BLOCK_TEXT,
        record({"input": or_null(_OBJECT)}, type=constant("tool_use"), id=STRING, name=_TEXT),
        record({"content": or_null(_BLOCKS_TEXT)}, type=constant("tool_result"), tool_use_id=STRING),
        record(type=one_of("thinking", "redacted_thinking")),
    ]
}
_SINGLE = {"disable_parallel_tool_use": or_null(BOOLEAN)}
_MESSAGES_CHOICE = {
    "anyOf": [
        record(_SINGLE, type=one_of("auto", "any", "none")),
        record(_SINGLE, type=constant("tool"), name=_NAME),
    ]
}
_MESSAGES_FORMAT = record(type=constant("json_schema"), schema=_OBJECT)
_MESSAGES_TOOL = {
    "anyOf": [
        record({"description": or_null(STRING)}, name=_NAME, input_schema=_OBJECT),
        # Left out: the server would have to run it.
        {"type": "object", "properties": {"input_schema": {"type": "null"}}},
    ]
}
_COUNTED = {
    "system": or_null(_BLOCKS_TEXT),
    "tools": or_null(list_of(_MESSAGES_TOOL)),
    "tool_choice": or_null(_MESSAGES_CHOICE),
    "output_format": or_null(_MESSAGES_FORMAT),
}

FIELDS: dict[str, dict[str, Schema]] = {
    "CompletionBody": {"prompt": _PROMPTS, "suffix": {"type": "null"}, "logit_bias": _BIAS, **_GUIDES},
    "EmbeddingBody": {"input": _PROMPTS},
    "ChatBody": {
        "tools": list_of(_TOOL),
        "tool_choice": {"anyOf": [one_of("none", "auto", "required"), _NAMED, _ALLOWED]},
        "max_tokens": {"type": "integer", "minimum": 1},
        "logit_bias": _BIAS,
        "modalities": list_of(constant("text")),
        **dict.fromkeys(("chat_template", "functions", "web_search_options", "moderation"), _EMPTY),
        **_GUIDES,
    },
    "Message": {
        "content": {"anyOf": [STRING, list_of(_PART)]},
        "tool_calls": list_of(_CALL),
    },
    "ResponseFormat": {"type": one_of("text", "json_object", "json_schema")},
    "ResponseBody": {
        "input": {"anyOf": [STRING, list_of(_RESPONSE_ITEM, minItems=1)]},
        "tools": list_of(_RESPONSE_TOOL),
        "tool_choice": _RESPONSE_CHOICE,
    },
    "TextOptions": {"format": _TEXT_FORMAT},
    "CountBody": _COUNTED,
    "MessagesBody": _COUNTED,
    "Turn": {
        "role": one_of("user", "assistant", "system"),
        "content": {"anyOf": [STRING, list_of(_BLOCK)]},
    },
    "OutputConfig": {"format": _MESSAGES_FORMAT},
}
"""By the name of a body, or of a part of one, and the name of a field."""

EXAMPLES: dict[str, dict[str, Any]] = {"ChatBody": {"messages": [{"role": "user", "content": "Hello!"}]}}
"""Where the shortest that a schema allows means nothing."""

ALTERNATIVES = {"TokenizeBody": ("prompt", "messages")}
"""Fields of which exactly one is given."""


def refine(name: str, schema: Schema, models: Sequence[str]) -> None:
    """Says of the fields of the body ``name`` what is known of them.

    models: the served names, if they are known.
    """
    properties: dict[str, Any] = schema.get("properties", {})
    for field, known in FIELDS.get(name, {}).items():
        given = properties[field]
        properties[field] = {**known, "default": given["default"]} if "default" in given else known
    for field, example in EXAMPLES.get(name, {}).items():
        properties[field]["examples"] = [example]
    for field in _RANGES.keys() & properties:
        properties[field] = _within(properties[field], _RANGES[field])
    if models and "model" in properties:
        properties["model"] = one_of(*models)
    for field in properties.keys() - set(schema.get("required", ())):
        properties[field] = _or_null(properties[field])
    if name == "ResponseFormat":
        schema["anyOf"] = [
            {"properties": {"type": one_of("text", "json_object")}},
            {"properties": {"json_schema": _OBJECT}, "required": ["json_schema"]},
        ]
    if name in ALTERNATIVES:
        schema["oneOf"] = [
            {"properties": {field: {"not": {"type": "null"}}}, "required": [field]}
            for field in ALTERNATIVES[name]
        ]


def _within(schema: Schema, limits: Schema) -> Schema:
    """``schema`` with the ``limits`` of its numbers, as far as it has none."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [_within(each, limits) for each in schema["anyOf"]]}
    return {**limits, **schema} if schema.get("type") in ("integer", "number") else schema


def _or_null(schema: Schema) -> Schema:
    """``schema``, or null, which says that the field is not given."""
    if not schema.keys() - {"title", "default"}:
        return schema
    default = {"default": schema["default"]} if "default" in schema else {}
    inner = {key: value for key, value in schema.items() if key != "default"}
    kinds = inner["anyOf"] if inner.keys() <= {"anyOf", "title"} else [inner]
    return {"anyOf": kinds if NULL in kinds else [*kinds, NULL], **default}
