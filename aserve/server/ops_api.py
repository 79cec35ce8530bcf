"""Routes for whoever operates the server, and the chat page."""

from __future__ import annotations

from pathlib import Path

import orjson
from quart import Blueprint, Response, send_from_directory

import aserve
from aserve.errors import EngineBusyError
from aserve.server.security import open_to_all
from aserve.server.service import service

STATIC = Path(__file__).parent / "static"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

blueprint = Blueprint("ops", __name__)


@blueprint.get("/health")
@open_to_all
async def health() -> Response:
    """200 when requests are served, 503 while loading or draining, 500 when the engine is dead."""
    await service().check()
    return Response("")


@blueprint.get("/health/ready")
@open_to_all
async def ready() -> Response:
    """The same as ``/health``, under the name of a readiness probe."""
    await service().check()
    return Response("")


@blueprint.get("/health/live")
@open_to_all
async def live() -> Response:
    """500 when only a restart helps; 200 otherwise, also while loading and draining."""
    try:
        await service().check()
    except EngineBusyError:
        return Response("")
    return Response("")


@blueprint.get("/version")
@open_to_all
async def version() -> Response:
    return Response(orjson.dumps({"version": aserve.__version__}), content_type="application/json")


@blueprint.get("/metrics")
@open_to_all
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
