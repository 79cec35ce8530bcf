"""``GET /openapi.json``: what every route takes, made from the bodies that are checked against."""

from __future__ import annotations

import functools
import re
from typing import Any

import orjson
from quart import Blueprint, Quart, Response, current_app

import aserve
from aserve.server.anthropic.body import CountBody, MessagesBody
from aserve.server.openai.embeddings import EmbeddingBody
from aserve.server.openai.protocol import Body, ChatBody, CompletionBody
from aserve.server.openai.response_input import ResponseBody
from aserve.server.openai.tokenization import DetokenizeBody, TokenizeBody

blueprint = Blueprint("openapi", __name__)

BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/embeddings": EmbeddingBody,
    "/v1/responses": ResponseBody,
    "/v1/responses/input_tokens": ResponseBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}

_PROMPTS = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "minItems": 1,
        },
    ]
}
"""The forms of ``prompt`` and ``input``, which are told apart by hand."""

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}


@blueprint.get("/openapi.json")
async def openapi() -> Response:
    app: Any = current_app
    return Response(_serialised(app._get_current_object()), content_type="application/json")


@functools.lru_cache(maxsize=1)
def _serialised(app: Quart) -> bytes:
    return orjson.dumps(document(app))


def document(app: Quart) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an application's routes."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, dict[str, Any]] = {}
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule):
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in sorted((rule.methods or set()) & {"DELETE", "GET", "POST"}):
            view = app.view_functions[rule.endpoint]
            operation: dict[str, Any] = {
                "operationId": f"{rule.endpoint}".replace(".", "_"),
                "summary": (view.__doc__ or view.__name__.replace("_", " ")).strip().splitlines()[0],
                "responses": {
                    "200": {"description": "the answer"},
                    "default": {
                        "description": "an error",
                        "content": {"application/json": {"schema": _reference("Error")}},
                    },
                },
            }
            names = re.findall(r"{(\w+)}", path)
            if names:
                operation["parameters"] = [
                    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                    for name in names
                ]
            if not getattr(view, "aserve_open", False):
                operation["security"] = [{"key": []}]
            body = BODIES.get(rule.rule)
            if body is not None:
                _add(schemas, body)
                content = {"application/json": {"schema": _reference(body.__name__)}}
                operation["requestBody"] = {"required": True, "content": content}
            paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "aserve", "version": aserve.__version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _add(schemas: dict[str, Any], body: type[Body]) -> None:
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    inner: dict[str, Any] = schema.pop("$defs", {})
    for name, each in {**inner, body.__name__: schema}.items():
        properties: dict[str, Any] = each.get("properties", {})
        for field in ("prompt", "input"):
            if field in properties and body in (CompletionBody, EmbeddingBody):
                properties[field] = _PROMPTS
        for field in properties.keys() - set(each.get("required", ())):
            properties[field] = _or_null(properties[field])
        schemas[name] = each


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema``, or null, which says that the field is not given."""
    kinds = schema.get("anyOf", [schema])
    if {"type": "null"} in kinds or not schema.keys() - {"title", "default"}:
        return schema
    return {"anyOf": [schema, {"type": "null"}]}
