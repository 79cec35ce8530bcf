"""Routes for whoever operates the server, and the chat page."""

from __future__ import annotations

from pathlib import Path

import orjson
from quart import Blueprint, Response, send_from_directory

import aserve
from aserve.errors import EngineBusyError, EngineDeadError
from aserve.server.security import open_to_all
from aserve.server.service import Condition, service

STATIC = Path(__file__).parent / "static"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

blueprint = Blueprint("ops", __name__)


@blueprint.get("/health")
@open_to_all
async def health() -> Response:
    """200 when requests are served, 500 when the engine is dead, 503 otherwise. Being busy is no reason."""
    condition, reason = service().condition()
    if condition is Condition.DEAD:
        raise EngineDeadError(reason)
    return _answer(condition is Condition.SERVING, reason)


@blueprint.get("/health/ready")
@open_to_all
async def ready() -> Response:
    """200 when requests are served; 503 while loading, draining or stalled, and when dead."""
    condition, reason = service().condition()
    return _answer(condition is Condition.SERVING, reason)


@blueprint.get("/health/live")
@open_to_all
async def live() -> Response:
    """503 when only a restart helps: the engine is dead, or has work and does not get on with it."""
    condition, reason = service().condition()
    return _answer(condition not in (Condition.DEAD, Condition.STALLED), reason)


def _answer(well: bool, reason: str) -> Response:
    if not well:
        raise EngineBusyError(reason)
    return Response("")


@blueprint.get("/version")
async def version() -> Response:
    return Response(orjson.dumps({"version": aserve.__version__}), content_type="application/json")


@blueprint.get("/metrics")
async def metrics() -> Response:
    """Prometheus text; empty before the model is loaded and with ``--disable-log-stats``."""
    shared = service()
    stats = shared.engine.stats if shared.engine is not None and shared.loaded else None
    body = stats.render() if stats is not None else b""
    return Response(body, content_type=PROMETHEUS)


@blueprint.get("/")
@open_to_all
async def chat_page() -> Response:
    page: Response = await send_from_directory(STATIC, "index.html", cache_timeout=0)
    return page


@blueprint.get("/static/<path:name>")
@open_to_all
async def static_file(name: str) -> Response:
    found: Response = await send_from_directory(STATIC, name)
    return found
