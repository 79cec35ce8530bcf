"""Errors in the shape of the Messages API."""

from __future__ import annotations

from typing import Any

import orjson
from quart import Blueprint, Response
from werkzeug.exceptions import HTTPException

from aserve.errors import AserveError
from aserve.server import errors
from aserve.server.service import new_id
from aserve.server.sse import named_event

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def body_of(status: int, message: str) -> dict[str, Any]:
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")
    request_id = new_id("req").replace("-", "_")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def event_of(error: BaseException) -> bytes:
    """The event that ends a stream whose request failed after the response head was sent."""
    known = errors.failure_of(error)
    return named_event("error", body_of(errors.describe(known)["code"], known.message))


def register(blueprint: Blueprint) -> None:
    """Gives failures of the blueprint's routes this shape, with the headers that they have anyway."""

    async def on_error(error: Any) -> Any:
        if isinstance(error, AserveError):
            answer: Response = await errors.on_aserve_error(error)
        elif isinstance(error, HTTPException):
            answer = await errors.on_http_error(error)
        else:
            answer = await errors.on_exception(error)
        described = await answer.get_json()
        answer.set_data(orjson.dumps(body_of(answer.status_code, described["message"])))
        return answer

    for kind in (AserveError, HTTPException, Exception):
        blueprint.register_error_handler(kind, on_error)
