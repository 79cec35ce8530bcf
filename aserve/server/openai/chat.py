"""``POST /v1/chat/completions``."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from quart import Blueprint, Response

from aserve.errors import InvalidRequestError
from aserve.messages.inputs import OutputKind
from aserve.messages.outputs import CompletionOutput, RequestOutput
from aserve.messages.params import SamplingParams
from aserve.server import sse
from aserve.server.connection import EventStream
from aserve.server.direct import LiveEvents
from aserve.server.openai import generation, prompts
from aserve.server.openai.generation import Envelope, Streams, Usage
from aserve.server.openai.logprobs import chat_logprobs
from aserve.server.openai.models import served_model
from aserve.server.openai.pieces import Reader, TextReader
from aserve.server.openai.prompts import Prompt
from aserve.server.openai.protocol import ChatBody, Message, read
from aserve.server.service import log_client_id, new_id, service
from aserve.tokenizer.chat import render_chat

if TYPE_CHECKING:
    from aserve.engine.async_engine import AsyncLLMEngine

blueprint = Blueprint("chat", __name__)

MANY_MESSAGES = 256
"""Messages, likewise."""

LONG_CONVERSATION = 32_000
"""Characters from which a conversation is rendered in a thread."""


@dataclass
class Begun:
    """A conversation whose answer is on its way; ``streams`` must be closed.

    echoed: text of the conversation that the answer begins with.
    """

    request_id: str
    model: str
    prompt: Prompt
    params: SamplingParams
    streams: Streams
    role: str
    echoed: str

    def reader(self) -> Reader:
        """Tells text and calls of tools apart; one for each choice."""
        return TextReader()


@blueprint.post("/v1/chat/completions")
async def create_chat_completion() -> Response:
    body = await read(ChatBody)
    begun = await begin(body, new_id("chatcmpl"))
    call = _Call(body, begun)
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
    body.check(vocab_size=limits.vocab_size, max_num_seqs=engine.config.scheduler.max_num_seqs)
    body.refuse_tools()
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    prompts.check_logprobs(body.top_logprobs, limits.max_logprobs, "top_logprobs")
    options = body.options()

    messages = conversation(body.messages)
    if body.continue_final_message and messages[-1]["role"] != "assistant":
        raise InvalidRequestError(
            "continue_final_message needs an assistant's message at the end", param="continue_final_message"
        )
    await engine.check_room()
    prompt = await make_prompt(engine, body, messages)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequestError("max_tokens must be at least 1", param="max_tokens")
    if clamp and max_tokens is not None:
        max_tokens = min(max_tokens, prompts.output_budget(len(prompt.ids), None, limits.max_model_len))
    budget = prompts.output_budget(len(prompt.ids), max_tokens, limits.max_model_len)
    top = (body.top_logprobs or 0) if body.logprobs else None
    params = body.sampling_params(max_tokens=budget, logprobs=top)

    log_client_id(request_id)
    # The best of several is known only at the end.
    whole = not body.stream or body.use_beam_search or params.best_of != body.n
    kind = OutputKind.FINAL_ONLY if whole else OutputKind.DELTA
    streams = await generation.submit(engine, request_id, [prompt], [params], kind, options)
    role = messages[-1]["role"]
    if body.add_generation_prompt and not body.continue_final_message:
        role = service().args.response_role or "assistant"
    echoed = messages[-1]["content"] if body.echo and messages[-1]["role"] == role else ""
    return Begun(request_id, model, prompt, params, streams, role, echoed)


async def count_prompt(body: ChatBody) -> int:
    """Tokens of the prompt that a conversation becomes; it is checked as if it were to be answered."""
    engine = await service().ready_engine()
    served_model(engine, body.model)
    limits = engine.model_config
    body.check(vocab_size=limits.vocab_size, max_num_seqs=engine.config.scheduler.max_num_seqs)
    body.refuse_tools()
    return len((await make_prompt(engine, body, conversation(body.messages))).ids)


async def make_prompt(engine: AsyncLLMEngine, body: ChatBody, messages: list[dict[str, str]]) -> Prompt:
    """The prompt that the chat template makes of ``messages``, tokenised."""
    text = await render(
        engine,
        messages,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        documents=body.documents,
        template_kwargs=body.template_variables(),
    )
    return await prompts.tokenise(
        engine,
        text,
        add_special_tokens=body.add_special_tokens,
        truncate=body.truncate_prompt_tokens,
        want_text=False,
    )


def conversation(messages: list[Message]) -> list[dict[str, str]]:
    """Roles and texts for the template.

    Messages without content (an assistant's that only called tools) are dropped; ``developer`` is
    what newer clients call ``system``. Raises InvalidRequestError for content that is not text.
    """
    found = []
    for index, message in enumerate(messages):
        if message.content is None:
            continue
        role = "system" if message.role == "developer" else message.role
        found.append({"role": role, "content": _text(message.content, f"messages.{index}.content")})
    if not found:
        raise InvalidRequestError("messages hold no content", param="messages")
    return found


def _text(content: str | list[dict[str, Any]], place: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        kind = part.get("type")
        text = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise InvalidRequestError(f"{place}: only text parts are supported", param="messages")
        texts.append(text)
    return "\n".join(texts)


async def render(
    engine: AsyncLLMEngine,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    documents: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> str:
    """The prompt the chat template makes of ``messages``; its errors are the request's (400)."""
    tokenizer = await prompts.tokenizer_of(engine)
    template = service().chat_template

    def work() -> str:
        return render_chat(
            tokenizer,
            messages,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            documents=documents,
            template_kwargs=template_kwargs,
        )

    size = sum(len(message["content"]) for message in messages)
    simple = not documents and not template_kwargs and len(messages) < MANY_MESSAGES
    return await service().render(work, quick=simple and size < LONG_CONVERSATION)


class _Call:
    """Turns the outputs of one call into its response or its events."""

    def __init__(self, body: ChatBody, begun: Begun) -> None:
        self._body = body
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._envelope = Envelope.new(begun.request_id, kind, begun.model)
        self._usage = Usage(len(begun.prompt.ids))
        self._role = begun.role
        self._echoed = begun.echoed
        self._opened = False
        self._finished: set[int] = set()
        self._plain = not body.logprobs and not body.continuous_usage
        self._templates: dict[int, sse.Template] = {}

    def response(self, result: RequestOutput) -> dict[str, Any]:
        choices = []
        self._usage.see(0, result)
        for index, output in enumerate(result.outputs):
            self._usage.completion_tokens += len(output.token_ids)
            choices.append(
                {
                    "index": index,
                    "message": {"role": self._role, "content": self._echoed + output.text},
                    "logprobs": self._logprobs(output),
                    "finish_reason": output.finish_reason,
                    "stop_reason": output.stop_reason,
                }
            )
        return {**self._envelope.wrap(choices), "usage": self._usage.as_dict()}

    def events_of(self, prompt_index: int, result: RequestOutput) -> bytes:
        found = []
        self._usage.see(prompt_index, result)
        if not self._opened:
            # Not before the first output: an early failure must come first, and clients take the time
            # of the first chunk as the time to the first token.
            self._opened = True
            found += self._opening()
        for position, output in enumerate(result.outputs):
            # With best_of > n, output.index skips; then all outputs come at once.
            index = position if self._body.best_of not in (None, self._body.n) else output.index
            ended = output.finish_reason is not None
            if index in self._finished or not (output.token_ids or output.text or ended):
                continue
            if ended:
                self._finished.add(index)
            self._usage.completion_tokens += len(output.token_ids)
            if self._plain and not ended:
                found.append(self._template(index).fill(output.text))
            else:
                found.append(sse.event(self._chunk(index, {"content": output.text}, output)))
        return found[0] if len(found) == 1 else b"".join(found)

    def ending(self) -> bytes:
        if not self._body.include_usage:
            return b""
        return sse.event({**self._envelope.wrap([]), "usage": self._usage.as_dict()})

    def _opening(self) -> list[bytes]:
        """Role chunks, then what is echoed, for every choice."""
        choices = range(self._body.n)
        deltas = [{"role": self._role, "content": ""}]
        if self._echoed:
            deltas.append({"content": self._echoed})
        return [sse.event(self._chunk(index, delta)) for delta in deltas for index in choices]

    def _template(self, index: int) -> sse.Template:
        """Chunks of a choice that hold content and nothing else."""
        template = self._templates.get(index)
        if template is None:
            template = sse.Template(lambda text: self._chunk(index, {"content": text}))
            self._templates[index] = template
        return template

    def _chunk(
        self, index: int, delta: dict[str, str], output: CompletionOutput | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(output) if output is not None else None,
            "finish_reason": output.finish_reason if output is not None else None,
        }
        if output is not None and output.finished():
            choice["stop_reason"] = output.stop_reason
        chunk = self._envelope.wrap([choice])
        if self._body.include_usage:
            chunk["usage"] = self._usage.as_dict() if self._body.continuous_usage else None
        return chunk

    def _logprobs(self, output: CompletionOutput) -> dict[str, Any] | None:
        if not self._body.logprobs or output.logprobs is None:
            return None
        return chat_logprobs(output.token_ids, output.logprobs, self._body.top_logprobs or 0)
