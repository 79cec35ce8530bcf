"""``GET /openapi.json``: what every route takes, made from the bodies that are checked against."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import orjson
from quart import Blueprint, Quart, Response, current_app

import aserve
from aserve.server.anthropic import body as anthropic
from aserve.server.anthropic.body import CountBody, MessagesBody
from aserve.server.openai.embeddings import EmbeddingBody
from aserve.server.openai.protocol import Body, ChatBody, CompletionBody
from aserve.server.openai.response_input import ResponseBody
from aserve.server.openai.tokenization import DetokenizeBody, TokenizeBody
from aserve.server.openai.translate import PASSED_ON
from aserve.server.openapi_answers import ERROR, MESSAGES_ERROR, responses
from aserve.server.openapi_fields import refine
from aserve.server.service import service

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

AS_IN_CHAT: dict[type[Body], tuple[str, ...]] = {
    ResponseBody: PASSED_ON,
    MessagesBody: anthropic.PASSED_ON,
}
"""Fields that are checked when they have become a chat's, under the same names."""


@blueprint.get("/openapi.json")
async def openapi() -> Response:
    """This document."""
    app: Any = current_app
    shared = service()
    names = () if shared.engine is None else tuple(shared.engine.model_config.served_model_name)
    guarded = bool(shared.args.api_key or shared.args.api_key_file)
    data = _serialised(app._get_current_object(), names, guarded)
    return Response(data, content_type="application/json")


@functools.lru_cache(maxsize=1)
def _serialised(app: Quart, models: tuple[str, ...], guarded: bool) -> bytes:
    return orjson.dumps(document(app, models, guarded=guarded))


def document(app: Quart, models: Sequence[str] = (), *, guarded: bool = True) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an application's routes.

    models: the names that are served, if they are known. guarded: whether there are keys at all.
    """
    schemas: dict[str, Any] = {"Error": ERROR, "MessagesError": MESSAGES_ERROR}
    paths: dict[str, dict[str, Any]] = {}
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule):
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in sorted((rule.methods or set()) & {"DELETE", "GET", "POST"}):
            view = app.view_functions[rule.endpoint]
            operation: dict[str, Any] = {
                "operationId": f"{rule.endpoint}".replace(".", "_"),
                "summary": (view.__doc__ or view.__name__.replace("_", " ")).strip().splitlines()[0],
                "responses": responses(path),
            }
            names = re.findall(r"{(\w+)}", path)
            if names:
                operation["parameters"] = [
                    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                    for name in names
                ]
            admin = getattr(view, "aserve_admin", False)
            if admin or (guarded and not getattr(view, "aserve_open", False)):
                operation["security"] = [{"key": []}]
            body = BODIES.get(rule.rule)
            if body is not None:
                _add(schemas, body, models)
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


def _add(schemas: dict[str, Any], body: type[Body], models: Sequence[str]) -> None:
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    inner: dict[str, Any] = schema.pop("$defs", {})
    passed_on = AS_IN_CHAT.get(body, ())
    chat = ChatBody.model_json_schema()["properties"] if passed_on else {}
    for field in passed_on:
        schema["properties"][field] = {**chat[field], "default": body.model_fields[field].default}
    for name, each in {**inner, body.__name__: schema}.items():
        refine(name, each, models)
        schemas[name] = each
