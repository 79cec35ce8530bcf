"""API keys, cross-origin requests and middleware named by import path."""

from __future__ import annotations

import hashlib
import hmac
import importlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from quart import Request, Response, current_app, request

from aserve.errors import AuthenticationError, ConfigError

if TYPE_CHECKING:
    from quart import Quart

    from aserve.config.server import ServerArgs

View = TypeVar("View", bound=Callable[..., Any])
CallNext = Callable[[Request], Awaitable[Response]]
HttpMiddleware = Callable[[Request, CallNext], Awaitable[Any]]

logger = logging.getLogger(__name__)

PREFLIGHT_SECONDS = "600"
_ALL_METHODS = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"


def open_to_all(view: View) -> View:
    """Marks a view that answers without an API key."""
    view.aserve_open = True  # type: ignore[attr-defined]
    return view


def needs_key(app: Quart, endpoint: str | None) -> bool:
    """Whether a request routed to ``endpoint`` (None: to nothing) needs the key. Denies by default."""
    view = app.view_functions.get(endpoint) if endpoint is not None else None
    return not getattr(view, "aserve_open", False)


class KeyGuard:
    """Accepts ``Authorization: Bearer KEY`` for any of the given keys."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def accepts(self, headers: Sequence[str]) -> bool:
        """``headers`` are the values of the Authorization headers; more than one is refused."""
        if len(headers) != 1:
            return False
        scheme, _, key = headers[0].partition(" ")
        if scheme.lower() != "bearer":
            return False
        # The server decodes headers as latin-1, so this gives back the bytes that were sent.
        given = _digest(key.strip().encode("latin-1", "replace"))
        # Every key is compared, in constant time over hashes: the time taken says nothing.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)

    async def check(self) -> None:
        """A ``before_request`` hook. The decision rests on the view routing chose, not on the path."""
        if request.method == "OPTIONS" or not needs_key(current_app, request.endpoint):
            return
        given = request.headers.getlist("Authorization")
        if not given and request.blueprint == "messages":  # where the key has a header of its own
            given = [f"Bearer {key}" for key in request.headers.getlist("X-Api-Key")]
        if not self.accepts(given):
            raise AuthenticationError("a valid API key is needed: Authorization: Bearer <key>")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Cors:
    """Cross-origin headers and preflight answers after the Fetch standard."""

    def __init__(self, args: ServerArgs) -> None:
        self._origins = set(args.allowed_origins)
        self._methods = {method.upper() for method in args.allowed_methods}
        self._headers = {header.lower() for header in args.allowed_headers}
        self._credentials = args.allow_credentials
        if self._credentials and "*" in self._origins:
            logger.warning("every origin may send credentials; name the origins with --allowed-origins")

    def allows(self, origin: str) -> bool:
        return "*" in self._origins or origin in self._origins

    async def preflight(self) -> Response | None:
        """A ``before_request`` hook: answers a preflight itself, before routing and the API key."""
        origin = request.headers.get("Origin")
        method = request.headers.get("Access-Control-Request-Method")
        if request.method != "OPTIONS" or origin is None or method is None:
            return None
        asked = request.headers.get("Access-Control-Request-Headers", "")
        names = [name.strip().lower() for name in asked.split(",") if name.strip()]
        refused = []
        if not self.allows(origin):
            refused.append("origin")
        if "*" not in self._methods and method.upper() not in self._methods:
            refused.append("method")
        if "*" not in self._headers and not self._headers.issuperset(names):
            refused.append("headers")
        if refused:
            return Response(f"not allowed: {', '.join(refused)}", status=400, mimetype="text/plain")
        methods = _ALL_METHODS if "*" in self._methods else ", ".join(sorted(self._methods))
        answer = Response("", status=200, mimetype="text/plain")
        answer.headers["Access-Control-Allow-Methods"] = methods
        answer.headers["Access-Control-Max-Age"] = PREFLIGHT_SECONDS
        if asked:
            answer.headers["Access-Control-Allow-Headers"] = ", ".join(names)
        answer.headers["Vary"] = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"
        return answer

    async def annotate(self, response: Response) -> Response:
        """An ``after_request`` hook: tells the browser whether the page may read the answer."""
        origin = request.headers.get("Origin")
        if origin is None or not self.allows(origin):
            return response
        if "*" in self._origins and not self._credentials:
            response.headers["Access-Control-Allow-Origin"] = "*"
        else:
            # With credentials the standard forbids "*", so the origin itself is named.
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers.setdefault("Vary", "Origin")
        if self._credentials:
            response.headers["Access-Control-Allow-Credentials"] = "true"
        return response


def load_middleware(paths: Sequence[str]) -> tuple[list[type], list[HttpMiddleware]]:
    """Imports ``module.name`` paths: ASGI classes and coroutine functions, each in the given order.

    Raises ConfigError (a ValueError) for a path that cannot be imported or is neither.
    """
    classes: list[type] = []
    functions: list[HttpMiddleware] = []
    for path in paths:
        module, _, name = path.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            reason = f"middleware {path!r} cannot be imported: {error}"
            raise ConfigError(reason, param="middleware") from error
        if inspect.isclass(found):
            classes.append(found)
        elif inspect.iscoroutinefunction(found):
            functions.append(found)
        else:
            raise ConfigError(
                f"middleware {path!r} must be a class or a coroutine function, not {type(found).__name__}",
                param="middleware",
            )
    return classes, functions
