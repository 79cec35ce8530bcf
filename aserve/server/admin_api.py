"""Routes that look into other people's requests: for admin keys alone."""

from __future__ import annotations

import orjson
from quart import Blueprint, Response

from aserve.errors import NotFoundError
from aserve.server.security import admin_only
from aserve.server.service import service

blueprint = Blueprint("admin", __name__)


@blueprint.get("/admin/requests")
@admin_only
async def requests() -> Response:
    """Every unfinished request: id, state, age in seconds, and token counts; nothing of what it says."""
    engine = await service().ready_engine()
    return Response(orjson.dumps({"requests": engine.unfinished()}), content_type="application/json")


@blueprint.delete("/admin/requests/<request_id>")
@admin_only
async def abort(request_id: str) -> Response:
    """Ends a request; its caller gets an error. 404 if there is none of that id."""
    engine = await service().ready_engine()
    if not engine.end_request(request_id, "the request was ended by the server's operator"):
        raise NotFoundError("there is no such request")
    return Response(orjson.dumps({"ended": True}), content_type="application/json")
