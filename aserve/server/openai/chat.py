"""``POST /v1/chat/completions``."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from quart import Blueprint, Response

from aserve.errors import InvalidRequestError
from aserve.messages.inputs import OutputKind, RequestOptions
from aserve.messages.params import SamplingParams
from aserve.server.connection import EventStream
from aserve.server.direct import LiveEvents
from aserve.server.openai import generation, prompts
from aserve.server.openai.chat_answer import Answer, ToolAnswer
from aserve.server.openai.conversation import conversation, make_prompt, plan_tools
from aserve.server.openai.generation import Streams
from aserve.server.openai.models import served_model
from aserve.server.openai.pieces import Reader, TextReader
from aserve.server.openai.prompts import Prompt
from aserve.server.openai.protocol import ChatBody, read
from aserve.server.openai.tools.plan import ToolPlan
from aserve.server.service import log_client_id, new_id, service

if TYPE_CHECKING:
    from aserve.engine.async_engine import AsyncLLMEngine

blueprint = Blueprint("chat", __name__)


@dataclass
class Begun:
    """A conversation whose answer is on its way; ``streams`` must be closed.

    echoed: text of the conversation that the answer begins with. tools: those that the model may call.
    whole: its outputs come at once, when it has ended.
    """

    request_id: str
    model: str
    prompt: Prompt
    params: SamplingParams
    streams: Streams
    role: str
    echoed: str
    tools: ToolPlan | None = None
    whole: bool = False

    def reader(self) -> Reader:
        """Tells text and calls of tools apart; one for each choice."""
        return TextReader() if self.tools is None else self.tools.reader(whole=self.whole)

    def answer(self, body: ChatBody) -> Answer:
        """Puts the outputs into the chat API's own form."""
        values: dict[str, Any] = {
            "request_id": self.request_id,
            "model": self.model,
            "prompt_tokens": len(self.prompt.ids),
            "role": self.role,
            "echoed": self.echoed,
        }
        if self.tools is None:
            return Answer(body, **values)
        return ToolAnswer(body, self.tools, whole=self.whole, **values)


@blueprint.post("/v1/chat/completions")
async def create_chat_completion() -> Response:
    body = await read(ChatBody)
    begun = await begin(body, new_id("chatcmpl"))
    call = begun.answer(body)
    streams = begun.streams
    if not body.stream:
        with closing(streams):
            (result,) = await streams.finals()
        return Response(orjson.dumps(call.response(result)), content_type="application/json")
    return EventStream(LiveEvents(streams, call, service().courier), on_close=streams.close)


async def begin(body: ChatBody, request_id: str, *, clamp: bool = False) -> Begun:
    """Checks a conversation, makes its prompt and queues it: the one way to an answer of every chat API.

    clamp: an output limit beyond the model's context is lowered to what is left, instead of refused.

    Raises AserveError for whatever can be known before the first token.
    """
    engine = await service().ready_engine()
    model = served_model(engine, body.model)
    limits = engine.model_config
    options = _checked(engine, body)
    messages = _messages(body)
    tools = await plan_tools(engine, body)
    await engine.check_room()
    prompt = await make_prompt(engine, body, messages, tools)
    max_tokens = _max_tokens(body)
    if clamp and max_tokens is not None:
        max_tokens = min(max_tokens, prompts.output_budget(len(prompt.ids), None, limits.max_model_len))
    budget = prompts.output_budget(len(prompt.ids), max_tokens, limits.max_model_len)
    top = (body.top_logprobs or 0) if body.logprobs else None
    params = body.sampling_params(max_tokens=budget, logprobs=top)
    if tools is not None:
        tools.apply(params, await prompts.tokenizer_of(engine), body.guided_decoding_backend)

    log_client_id(request_id)
    # The best of several is known only at the end.
    whole = not body.stream or body.use_beam_search or params.best_of != body.n
    kind = OutputKind.FINAL_ONLY if whole else OutputKind.DELTA
    streams = await generation.submit(engine, request_id, [prompt], [params], kind, options)
    role = messages[-1]["role"]
    if body.add_generation_prompt and not body.continue_final_message:
        role = service().args.response_role or "assistant"
    echoed = messages[-1]["content"] if body.echo and messages[-1]["role"] == role else ""
    return Begun(request_id, model, prompt, params, streams, role, echoed, tools, whole)


async def count_prompt(body: ChatBody) -> int:
    """Tokens of the prompt that a conversation becomes; it is checked as if it were to be answered."""
    engine = await service().ready_engine()
    served_model(engine, body.model)
    _checked(engine, body)
    body.sampling_params(max_tokens=_max_tokens(body))
    messages = _messages(body)
    tools = await plan_tools(engine, body)
    return len((await make_prompt(engine, body, messages, tools)).ids)


def _checked(engine: AsyncLLMEngine, body: ChatBody) -> RequestOptions:
    limits = engine.model_config
    body.check(vocab_size=limits.vocab_size, max_num_seqs=engine.config.scheduler.max_num_seqs)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    prompts.check_logprobs(body.top_logprobs, limits.max_logprobs, "top_logprobs")
    return body.options()


def _messages(body: ChatBody) -> list[dict[str, Any]]:
    messages = conversation(body.messages)
    if body.continue_final_message and messages[-1]["role"] != "assistant":
        raise InvalidRequestError(
            "continue_final_message needs an assistant's message at the end", param="continue_final_message"
        )
    return messages


def _max_tokens(body: ChatBody) -> int | None:
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked: int | None = getattr(body, name)
    if asked is not None and asked < 1:
        raise InvalidRequestError(f"{name} must be at least 1", param=name)
    return asked
