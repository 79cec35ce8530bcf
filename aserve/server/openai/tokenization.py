"""``POST /tokenize``, ``POST /detokenize`` and ``GET /tokenizer_info``."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import orjson
from pydantic import Field, Strict
from quart import Blueprint, Response

from aserve.errors import InvalidRequestError
from aserve.server.openai.conversation import conversation, render
from aserve.server.openai.models import served_model
from aserve.server.openai.prompts import tokenizer_of
from aserve.server.openai.protocol import Body, Bool, Messages, TemplateVariables, check_token_ids, read
from aserve.server.service import service

blueprint = Blueprint("tokenization", __name__)

MAX_TOKENS = 1 << 17
"""Most ids that one request turns into text."""

_INLINE_TOKENS = 4096
"""Longer lists are worked on in a thread, so that no stream waits for them."""


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: Bool | None = None
    add_generation_prompt: Bool = True
    return_token_strs: Bool = False
    chat_template_kwargs: TemplateVariables | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Strict()]], Field(max_length=MAX_TOKENS)]


@blueprint.post("/tokenize")
async def tokenize() -> Response:
    """Token ids of a prompt (with special tokens by default) or of a conversation (without)."""
    body = await read(TokenizeBody)
    engine = await service().ready_engine()
    if body.model is not None:
        served_model(engine, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give either prompt or messages", param="prompt")
    tokenizer = await tokenizer_of(engine)
    if body.messages is not None:
        text = await render(
            engine,
            conversation(body.messages),
            add_generation_prompt=body.add_generation_prompt,
            template_kwargs=body.chat_template_kwargs,
        )
        special = body.add_special_tokens or False
    else:
        text = body.prompt or ""
        special = True if body.add_special_tokens is None else body.add_special_tokens
    ids = await engine.encode_prompt(text, special)
    answer = {"count": len(ids), "max_model_len": engine.model_config.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = await _apart(len(ids), tokenizer.convert_ids_to_tokens, ids)
    return _json(answer)


@blueprint.post("/detokenize")
async def detokenize() -> Response:
    """The text of token ids, special tokens included."""
    body = await read(DetokenizeBody)
    engine = await service().ready_engine()
    if body.model is not None:
        served_model(engine, body.model)
    check_token_ids(body.tokens, engine.model_config.vocab_size, "tokens")
    tokenizer = await tokenizer_of(engine)
    return _json({"prompt": await _apart(len(body.tokens), tokenizer.decode, body.tokens)})


@blueprint.get("/tokenizer_info")
async def tokenizer_info() -> Response:
    """What a client needs to work out the prompts of this server by itself."""
    engine = await service().ready_engine()
    tokenizer = await tokenizer_of(engine)
    answer = {
        "tokenizer_class": type(tokenizer).__name__,
        "chat_template": service().chat_template or getattr(tokenizer, "chat_template", None),
        "vocab_size": engine.model_config.vocab_size,
        "model_max_length": engine.model_config.max_model_len,
    }
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        answer[name] = getattr(tokenizer, name, None)
        answer[f"{name}_id"] = getattr(tokenizer, f"{name}_id", None)
    return _json(answer)


async def _apart(size: int, work: Any, argument: list[int]) -> Any:
    return work(argument) if size <= _INLINE_TOKENS else await asyncio.to_thread(work, argument)


def _json(value: dict[str, Any]) -> Response:
    return Response(orjson.dumps(value), content_type="application/json")
