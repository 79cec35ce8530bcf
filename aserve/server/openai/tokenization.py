"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

import orjson
from quart import Blueprint, Response

from aserve.errors import InvalidRequestError
from aserve.server.openai.chat import conversation, render
from aserve.server.openai.models import served_model
from aserve.server.openai.prompts import tokenizer_of
from aserve.server.openai.protocol import DetokenizeBody, TokenizeBody, check_token_ids, read
from aserve.server.service import service

blueprint = Blueprint("tokenization", __name__)


@blueprint.post("/tokenize")
async def tokenize() -> Response:
    """Token ids of a prompt (with special tokens by default) or of a conversation (without)."""
    body = await read(TokenizeBody)
    engine = await service().ready_engine()
    if body.model is not None:
        served_model(engine, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give either prompt or messages", param="prompt")
    if body.messages is not None:
        text = await render(
            engine, conversation(body.messages), add_generation_prompt=body.add_generation_prompt
        )
        special = body.add_special_tokens or False
    else:
        text = body.prompt or ""
        special = True if body.add_special_tokens is None else body.add_special_tokens
    ids = await engine.encode_prompt(text, special)
    answer = {"count": len(ids), "max_model_len": engine.model_config.max_model_len, "tokens": ids}
    return Response(orjson.dumps(answer), content_type="application/json")


@blueprint.post("/detokenize")
async def detokenize() -> Response:
    body = await read(DetokenizeBody)
    engine = await service().ready_engine()
    if body.model is not None:
        served_model(engine, body.model)
    check_token_ids(body.tokens, engine.model_config.vocab_size, "tokens")
    tokenizer = await tokenizer_of(engine)
    return Response(orjson.dumps({"prompt": tokenizer.decode(body.tokens)}), content_type="application/json")
