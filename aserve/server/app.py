"""The Quart application: routes, error bodies, and the engine's life inside the server's."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import orjson
from quart import Quart, Request, Response, request
from quart.ctx import RequestContext
from quart.globals import request_ctx
from quart.json.provider import JSONProvider
from quart.sessions import NullSession
from werkzeug.routing import MapAdapter, Rule

from aserve.errors import AserveError
from aserve.server import admin_api, errors, openapi, ops_api, pipelining
from aserve.server.anthropic import messages
from aserve.server.connection import Connection, Exchanges
from aserve.server.keys import KeyRing
from aserve.server.openai import chat, completions, embeddings, models, responses, tokenization
from aserve.server.request import ServerRequest, is_coroutine_function
from aserve.server.security import Cors, HttpMiddleware, KeyGuard, check_head, load_middleware
from aserve.server.service import Service, client_request_id, new_id
from aserve.server.tracing import RequestTraces, check_endpoint, exporter_to
from aserve.tokenizer.chat import resolve_chat_template

if TYPE_CHECKING:
    from quart.typing import ResponseTypes
    from quart.wrappers.base import BaseRequestWebsocket

    from aserve.args import AsyncEngineArgs
    from aserve.config.server import ServerArgs
    from aserve.engine.async_engine import AsyncLLMEngine

logger = logging.getLogger(__name__)

BLUEPRINTS = (
    ops_api, openapi, admin_api, models, completions, chat, responses, messages, embeddings, tokenization,
)  # fmt: skip


class OrjsonProvider(JSONProvider):
    """JSON of dicts that views return and of ``request.get_json``."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return orjson.dumps(obj).decode()

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        return orjson.loads(s)


class App(Quart):
    """Quart with coroutine middleware ``(request, call_next)`` around its dispatch."""

    asgi_http_class = Connection
    request_class = ServerRequest
    json_provider_class = OrjsonProvider

    def __init__(self, name: str) -> None:
        super().__init__(name, static_folder=None)
        self.http_middleware: list[HttpMiddleware] = []
        self._no_session = NullSession()

    def request_context(self, request: Request) -> RequestContext:
        return Context(self, request, self._no_session)

    @cached_property
    def plain_routes(self) -> dict[tuple[str, str], Rule]:
        """Routes without variables, by method and path."""
        return {
            (method, rule.rule): rule
            for rule in reversed(list(self.url_map.iter_rules()))  # of two, the first counts
            if _is_plain(rule)
            for method in rule.methods or ()
        }

    def create_url_adapter(self, request: BaseRequestWebsocket | None) -> MapAdapter | None:
        # No route depends on the host, so what a client says of it is not looked at.
        if request is None:
            return super().create_url_adapter(None)
        path, query = request.path, request.query_string.decode("latin-1")
        return MapAdapter(self.url_map, "", "/", "", request.scheme, path, request.method, query)

    def ensure_async(self, func: Any) -> Any:
        return func if is_coroutine_function(func) else super().ensure_async(func)

    async def full_dispatch_request(self, request_context: RequestContext | None = None) -> ResponseTypes:
        try:
            if not self.http_middleware:
                return await super().full_dispatch_request(request_context)
            return await self._dispatch_inside_middleware(request_context)
        except Exception as error:  # a hook's or middleware's own failure; those of views are answered inside
            return await self.make_response(await self.handle_user_exception(error))

    async def _dispatch_inside_middleware(self, request_context: RequestContext | None) -> ResponseTypes:
        dispatch = super().full_dispatch_request

        async def inner(_: Request) -> Any:
            return await dispatch(request_context)

        call: Callable[[Request], Any] = inner
        for middleware in self.http_middleware:
            call = _around(middleware, call, self.make_response)
        return cast("ResponseTypes", await call((request_context or request_ctx).request))


class Context(RequestContext):
    """A request's context; a route without variables is found by its path alone."""

    app: App

    def match_request(self) -> None:
        asked = self.request
        rule = self.app.plain_routes.get((asked.method, asked.path))
        if rule is None:
            super().match_request()
        else:
            asked.url_rule, asked.view_args = rule, {}  # type: ignore[assignment]


def _is_plain(rule: Rule) -> bool:
    """Whether nothing but a request's method and path says that it is for this route."""
    special = rule.arguments or rule.defaults or rule.host or rule.subdomain
    return not (special or rule.build_only or rule.websocket or rule.redirect_to or rule.alias)


def _around(
    middleware: HttpMiddleware, call: Callable[[Request], Any], make_response: Callable[[Any], Any]
) -> Callable[[Request], Any]:
    async def wrapped(asked: Request) -> Any:
        return await make_response(await middleware(asked, call))

    return wrapped


def create_app(
    engine_args: AsyncEngineArgs | None,
    server_args: ServerArgs,
    engine: AsyncLLMEngine | None = None,
    *,
    on_fatal: Callable[[], None] | None = None,
    on_loaded: Callable[[], None] | None = None,
    warm: bool = True,
) -> Quart:
    """Builds the application.

    The engine is ``engine``, or one made from ``engine_args`` when serving starts; either way its
    weights are loaded while the port is already open, and it is stopped after the last request.

    on_fatal: called if the engine cannot be loaded; by default the process ends with status 1.
    on_loaded: called when it is loaded.
    warm: it then also gets ready for guided requests and large bodies, if ``engine_args`` are given.

    Raises ConfigError for server settings that cannot work.
    """
    app = App("aserve")
    app.config["MAX_CONTENT_LENGTH"] = server_args.max_body_size
    app.config["APPLICATION_ROOT_PATH"] = server_args.root_path or ""
    # Doubled slashes are merged before routing (Connection); a redirect would lose a POST's body.
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = False
    shared = Service(
        server_args,
        chat_template=resolve_chat_template(server_args.chat_template),
        log_requests=engine_args is None or not engine_args.disable_log_requests,
        on_fatal=on_fatal or _exit,
        on_loaded=on_loaded,
        traced_by=_tracing(server_args.otlp_traces_endpoint),
    )
    app.extensions["aserve"] = shared
    app.extensions["exchanges"] = Exchanges()

    for module in BLUEPRINTS:
        app.register_blueprint(module.blueprint)
    errors.register(app)
    keys = KeyRing(server_args.api_key or (), server_args.api_key_file)
    _add_hooks(app, server_args, keys, shared)
    _add_middleware(app, server_args.middleware)

    @app.while_serving
    async def own_engine() -> AsyncGenerator[None, None]:
        shared.start(engine or _make_engine(engine_args), warm=warm and engine_args is not None)
        pipelining.refusals.append(shared.count_error)
        try:
            with _reloading(keys, server_args.api_key_file):
                yield
        finally:
            pipelining.refusals.remove(shared.count_error)
        await shared.stop()

    return app


def _add_hooks(app: App, args: ServerArgs, keys: KeyRing, shared: Service) -> None:
    cors = Cors(args)
    app.before_request(check_head)
    app.before_request(cors.preflight)
    app.before_request(KeyGuard(keys).check)

    async def identify(response: Response) -> Response:
        response.headers["X-Request-Id"] = client_request_id() or new_id("req")
        return response

    async def count(response: Response) -> Response:
        # A probe is answered 503 as often as it asks: that is no request that failed.
        if response.status_code >= 400 and request.blueprint != "ops":
            shared.count_error(response.status_code)
        return response

    async def note_caller() -> None:
        if shared.traces is not None:
            shared.traces.note_caller(request.headers, request.path)

    if args.otlp_traces_endpoint is not None:
        app.before_request(note_caller)
    app.after_request(count)
    app.after_request(cors.annotate)
    app.after_request(identify)


def _tracing(endpoint: str | None) -> Callable[[str], RequestTraces] | None:
    """What makes the traces of a model's requests. ConfigError: they cannot be sent there."""
    if endpoint is None:
        return None
    check_endpoint(endpoint)
    return lambda model: RequestTraces(exporter_to(endpoint), model)


def _add_middleware(app: App, paths: list[str]) -> None:
    classes, functions = load_middleware(paths)
    # The last one named is outermost, and classes are outside functions.
    app.http_middleware = functions
    for cls in classes:
        app.asgi_app = cls(app.asgi_app)  # type: ignore[method-assign]


@contextmanager
def _reloading(keys: KeyRing, path: str | None) -> Iterator[None]:
    """Has SIGHUP read the key file again, if there is one."""
    if path is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, keys.reload)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def _make_engine(engine_args: AsyncEngineArgs | None) -> AsyncLLMEngine:
    from aserve.engine.async_engine import AsyncLLMEngine
    from aserve.messages.inputs import UsageContext

    if engine_args is None:
        raise TypeError("create_app needs engine_args or an engine")
    try:
        return AsyncLLMEngine.from_engine_args(engine_args, usage_context=UsageContext.OPENAI_API_SERVER)
    except AserveError as error:
        # Quart would log a traceback, Hypercorn another; the sentence is enough.
        logger.error("the engine cannot be started: %s", error)
        sys.exit(2)


def _exit() -> None:
    """Ends the process from inside the event loop, whoever runs it."""
    sys.exit(1)
