"""API keys, cross-origin requests and middleware named by import path."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from quart import Request, Response, current_app, g, request
from werkzeug.exceptions import RequestHeaderFieldsTooLarge, RequestURITooLarge

from aserve.errors import AuthenticationError, ConfigError, ForbiddenError

if TYPE_CHECKING:
    from aserve.config.server import ServerArgs
    from aserve.server.keys import KeyRing

View = TypeVar("View", bound=Callable[..., Any])
CallNext = Callable[[Request], Awaitable[Response]]
HttpMiddleware = Callable[[Request, CallNext], Awaitable[Any]]

logger = logging.getLogger(__name__)

PREFLIGHT_SECONDS = "600"
_ALL_METHODS = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"


MAX_HEADERS = 128
MAX_HEADER_BYTES = 32 * 1024
MAX_TARGET_BYTES = 8 * 1024


async def check_head() -> None:
    """The first ``before_request`` hook: refuses a head that is larger than any client's."""
    scope = request.scope
    headers = list(scope["headers"])
    size = sum([len(name) + len(value) for name, value in headers])
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        raise RequestHeaderFieldsTooLarge
    if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_TARGET_BYTES:
        raise RequestURITooLarge


def open_to_all(view: View) -> View:
    """Marks a view that answers without an API key."""
    view.aserve_open = True  # type: ignore[attr-defined]
    return view


def admin_only(view: View) -> View:
    """Marks a view that answers to an admin key alone, and to nobody where there is none."""
    view.aserve_admin = True  # type: ignore[attr-defined]
    return view


class KeyGuard:
    """Lets a request through to its view if the key it shows allows that. Denies by default."""

    def __init__(self, keys: KeyRing) -> None:
        self.keys = keys

    async def check(self) -> None:
        """A ``before_request`` hook. The decision rests on the view routing chose, not on the path."""
        asked: Request = request._get_current_object()  # type: ignore[attr-defined]
        if asked.method == "OPTIONS":
            return
        endpoint = asked.endpoint
        view = current_app.view_functions.get(endpoint) if endpoint is not None else None
        admin = getattr(view, "aserve_admin", False)
        if getattr(view, "aserve_open", False) or not (self.keys or admin):
            return
        headers = asked.headers
        # Only where the API that is served has a header of its own for the key.
        own = headers.getlist("X-Api-Key") if asked.blueprint == "messages" else ()
        key = self.keys.find(headers.getlist("Authorization"), own)
        if key is None:
            raise AuthenticationError("a valid API key is needed: Authorization: Bearer <key>")
        if admin and not key.admin:
            raise ForbiddenError("this needs an admin key")
        g.key_name = key.name


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
        if request.method != "OPTIONS":
            return None
        origin = request.headers.get("Origin")
        method = request.headers.get("Access-Control-Request-Method")
        if origin is None or method is None:
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
