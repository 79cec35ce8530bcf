"""Errors as OpenAI clients know them: one body for every status, and never a traceback in it."""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import orjson
from quart import Response, request
from werkzeug.exceptions import HTTPException

from aserve.errors import AserveError, ConfigError, without_private
from aserve.server import sse

if TYPE_CHECKING:
    from quart import Quart

logger = logging.getLogger(__name__)

INTERNAL = AserveError("the server failed to answer this request")

_TYPES = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}

_MESSAGES = {
    404: "there is no such path",
    405: "this path does not take that method",
    408: "the request body did not arrive in time",
    413: "the request body is too large",
    414: "the request target is too long",
    431: "the request's headers are too large or too many",
    415: "the request body must be JSON without content encoding",
}


def error_object(status: int, message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"object": "error", "message": message, "type": kind, "param": param, "code": status}


def describe(error: AserveError) -> dict[str, Any]:
    """The error object of ``error``; a ConfigError raised by a request is the server's fault."""
    status = 500 if isinstance(error, ConfigError) else error.status
    message = error.message if status < 500 else without_private(error.message)
    return error_object(status, message, error.type, error.param)


def error_response(described: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """``described`` both flat and under ``error``: clients look for either."""
    nested = {key: described[key] for key in ("message", "type", "param", "code")}
    return Response(
        orjson.dumps({**described, "error": nested}),
        status=described["code"],
        headers=headers,
        content_type="application/json",
    )


def respond(error: AserveError) -> Response:
    headers = {}
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return error_response(describe(error), headers)


def failure_of(error: BaseException) -> AserveError:
    """What a client may know of the failure of its stream; the log gets the rest."""
    if isinstance(error, AserveError):
        return error
    logger.error("a stream failed", exc_info=error)
    return INTERNAL


def error_event(error: BaseException) -> bytes:
    """The event that ends a stream whose request failed after the response head was sent."""
    return sse.event({"error": describe(failure_of(error))})


def _http_error(error: HTTPException) -> Any:
    if error.code is None or error.code < 400:
        return error  # a redirect
    # Werkzeug's own texts are written for browsers.
    message = _MESSAGES.get(error.code) or HTTPStatus(error.code).phrase.lower()
    default = "BadRequestError" if error.code < 500 else "InternalServerError"
    headers = {k: v for k, v in error.get_headers() if k in ("Allow", "Retry-After")}
    return error_response(error_object(error.code, message, _TYPES.get(error.code, default)), headers)


async def on_aserve_error(error: AserveError) -> Any:
    if error.status == 500:
        logger.error("request failed: %s", error.message)
    return respond(error)


async def on_http_error(error: HTTPException) -> Any:
    if error.code == 413:
        request.body.clear()  # a timer of the body's time limit may keep it alive for as long as that
    return _http_error(error)


async def on_exception(error: Exception) -> Any:
    logger.error("request failed", exc_info=error)
    return respond(INTERNAL)


def register(app: Quart) -> None:
    """Gives every failure of a route or of routing its JSON body."""
    app.register_error_handler(AserveError, on_aserve_error)
    app.register_error_handler(HTTPException, on_http_error)
    app.register_error_handler(Exception, on_exception)
