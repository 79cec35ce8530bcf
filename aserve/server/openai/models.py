"""``GET /v1/models``, and which names are models."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

import orjson
from quart import Blueprint, Response

from aserve.errors import NotFoundError
from aserve.server.service import service

if TYPE_CHECKING:
    from aserve.engine.async_engine import AsyncLLMEngine

blueprint = Blueprint("models", __name__)


def served_model(engine: AsyncLLMEngine, name: str) -> str:
    """The name a response carries for a request that asks for ``name``: the first served one.

    Raises NotFoundError for a name that is not served.
    """
    names = engine.model_config.served_model_name
    if name not in names:
        raise NotFoundError(f"there is no model `{name[:256]}` here", param="model")
    return names[0]


def model_cards(engine: AsyncLLMEngine) -> list[dict[str, Any]]:
    config = engine.model_config
    created = int(time.time())
    return [
        {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "aserve",
            "root": config.served_model_name[0],
            "parent": None,
            "max_model_len": config.max_model_len,
            "permission": [
                {
                    "id": f"modelperm-{secrets.token_hex(16)}",
                    "object": "model_permission",
                    "created": created,
                    "allow_create_engine": False,
                    "allow_sampling": True,
                    "allow_logprobs": True,
                    "allow_search_indices": False,
                    "allow_view": True,
                    "allow_fine_tuning": False,
                    "organization": "*",
                    "group": None,
                    "is_blocking": False,
                }
            ],
        }
        for name in config.served_model_name
    ]


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), content_type="application/json")


@blueprint.get("/v1/models")
async def list_models() -> Response:
    engine = await service().ready_engine()
    return _json({"object": "list", "data": model_cards(engine)})


@blueprint.get("/v1/models/<path:name>")
async def show_model(name: str) -> Response:
    engine = await service().ready_engine()
    for card in model_cards(engine):
        if card["id"] == name:
            return _json(card)
    raise NotFoundError(f"there is no model `{name[:256]}` here", param="model")
