"""What the routes answer, for the OpenAPI document: JSON schemas by path, and other media types."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
EVENTS = "text/event-stream"


def constant(value: str) -> Schema:
    return {"type": "string", "const": value}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def list_of(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def record(optional: dict[str, Schema] | None = None, /, **fields: Schema) -> Schema:
    """An object with these fields, and perhaps the optional ones."""
    return {"type": "object", "properties": {**fields, **(optional or {})}, "required": list(fields)}


def or_null(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas, NULL]}


_USAGE = record(
    {"prompt_tokens_details": record(cached_tokens=COUNT)},
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
)
_ENDS = or_null(one_of("stop", "length", "tool_calls", "abort"))
_STOP = or_null(STRING, {"type": "integer"})
_TOP = record(token=STRING, logprob=NUMBER, bytes=list_of({"type": "integer", "minimum": 0, "maximum": 255}))
_CHAT_LOGPROBS = record(content=list_of({"allOf": [_TOP, record(top_logprobs=list_of(_TOP))]}))
_CALL = record(id=STRING, type=constant("function"), function=record(name=STRING, arguments=STRING))
_MODEL = record(
    id=STRING, object=constant("model"), created=COUNT, owned_by=STRING, root=STRING,
    parent=or_null(STRING), max_model_len=COUNT, permission=list_of({"type": "object"}),
)  # fmt: skip

_COMPLETION = record(
    id=STRING, object=constant("text_completion"), created=COUNT, model=STRING, usage=_USAGE,
    choices=list_of(
        record(
            index=COUNT, text=STRING, finish_reason=_ENDS, stop_reason=_STOP,
            logprobs=or_null(
                record(
                    text_offset=list_of(COUNT), tokens=list_of(STRING),
                    token_logprobs=list_of(or_null(NUMBER)),
                    top_logprobs=list_of(or_null({"type": "object", "additionalProperties": NUMBER})),
                )
            ),
        ),
        minItems=1,
    ),
)  # fmt: skip

_CHAT = record(
    id=STRING, object=constant("chat.completion"), created=COUNT, model=STRING, usage=_USAGE,
    choices=list_of(
        record(
            index=COUNT, finish_reason=_ENDS, stop_reason=_STOP, logprobs=or_null(_CHAT_LOGPROBS),
            message=record({"tool_calls": list_of(_CALL, minItems=1)}, role=STRING, content=or_null(STRING)),
        ),
        minItems=1,
    ),
)  # fmt: skip

_EMBEDDINGS = record(
    id=STRING, object=constant("list"), created=COUNT, model=STRING, usage=_USAGE,
    data=list_of(
        record(index=COUNT, object=constant("embedding"), embedding={"anyOf": [list_of(NUMBER), STRING]}),
        minItems=1,
    ),
)  # fmt: skip

_ITEM_STATES = one_of("completed", "incomplete")
_RESPONSE = record(
    id=STRING, object=constant("response"), created_at=COUNT, completed_at=or_null(COUNT),
    status=_ITEM_STATES, error=NULL, model=STRING, metadata={"type": "object"},
    incomplete_details=or_null(record(reason=STRING)), instructions=or_null(STRING),
    output=list_of(
        {
            "anyOf": [
                record(
                    id=STRING, type=constant("message"), status=_ITEM_STATES, role=constant("assistant"),
                    content=list_of(
                        record(
                            type=constant("output_text"), text=STRING, annotations=list_of({}),
                            logprobs=list_of(_TOP),
                        )
                    ),
                ),
                record(
                    id=STRING, type=constant("function_call"), status=_ITEM_STATES, call_id=STRING,
                    name=STRING, arguments=STRING,
                ),
            ]
        },
        minItems=1,
    ),
    parallel_tool_calls=BOOLEAN, temperature=NUMBER, top_p=NUMBER, tools=list_of({"type": "object"}),
    usage=record(
        input_tokens=COUNT, input_tokens_details=record(cached_tokens=COUNT), output_tokens=COUNT,
        output_tokens_details=record(reasoning_tokens=COUNT), total_tokens=COUNT,
    ),
)  # fmt: skip

_MESSAGE = record(
    id=STRING, type=constant("message"), role=constant("assistant"), model=STRING,
    content=list_of(
        {
            "anyOf": [
                record(type=constant("text"), text=STRING),
                record(type=constant("tool_use"), id=STRING, name=STRING, input={"type": "object"}),
            ]
        }
    ),
    stop_reason=or_null(one_of("end_turn", "max_tokens", "stop_sequence", "tool_use")),
    stop_sequence=or_null(STRING),
    usage=record(
        input_tokens=COUNT, output_tokens=COUNT, cache_read_input_tokens=COUNT,
        cache_creation_input_tokens=COUNT,
    ),
)  # fmt: skip

ERROR = record(
    object=constant("error"), message=STRING, type=STRING, param=or_null(STRING), code=COUNT,
    error=record(message=STRING, type=STRING, param=or_null(STRING), code=COUNT),
)  # fmt: skip
MESSAGES_ERROR = record(type=constant("error"), error=record(type=STRING, message=STRING), request_id=STRING)

ANSWERS: dict[str, Schema] = {
    "/v1/completions": _COMPLETION,
    "/v1/chat/completions": _CHAT,
    "/v1/embeddings": _EMBEDDINGS,
    "/v1/responses": _RESPONSE,
    "/v1/responses/input_tokens": record(object=constant("response.input_tokens"), input_tokens=COUNT),
    "/v1/messages": _MESSAGE,
    "/v1/messages/count_tokens": record(input_tokens=COUNT),
    "/v1/models": record(object=constant("list"), data=list_of(_MODEL, minItems=1)),
    "/v1/models/{name}": _MODEL,
    "/tokenize": record(
        {"token_strs": list_of(STRING)}, count=COUNT, max_model_len=COUNT, tokens=list_of(COUNT)
    ),
    "/detokenize": record(prompt=STRING),
    "/tokenizer_info": record(
        tokenizer_class=STRING, chat_template=or_null(STRING), vocab_size=COUNT, model_max_length=COUNT,
        **{name: or_null(STRING) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
        **{f"{name}_token_id": or_null(COUNT) for name in ("bos", "eos", "pad", "unk")},
    ),
    "/version": record(version=STRING),
    "/openapi.json": record(openapi=STRING, info={"type": "object"}, paths={"type": "object"}),
    "/admin/requests": record(requests=list_of(record(id=STRING))),
    "/admin/requests/{request_id}": record(ended={"type": "boolean", "const": True}),
}  # fmt: skip
"""The JSON of an answer with status 200, by path."""

STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
"""Answers that are events instead where the body says ``stream``."""

OTHER_MEDIA = {
    "/metrics": "text/plain",
    "/": "text/html",
    "/static/{name}": "*/*",
}
"""Media types of answers that are not JSON. The health routes answer with nothing at all."""


def responses(path: str) -> dict[str, Any]:
    """The ``responses`` of a path's operation."""
    content: dict[str, Any] = {}
    if path in ANSWERS:
        content["application/json"] = {"schema": ANSWERS[path]}
    if path in STREAMED:
        # Of each event.
        content[EVENTS] = {"schema": record({"event": STRING}, data=STRING)}
    if path in OTHER_MEDIA:
        content[OTHER_MEDIA[path]] = {"schema": STRING}
    answer: dict[str, Any] = {"description": "the answer"}
    if content:
        answer["content"] = content
    error = "MessagesError" if path.startswith("/v1/messages") else "Error"
    reference = {"$ref": f"#/components/schemas/{error}"}
    wrong = {"description": "an error", "content": {"application/json": {"schema": reference}}}
    return {"200": answer, "default": wrong}
