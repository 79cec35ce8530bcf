"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import closing
from typing import Any

import orjson
from quart import Blueprint, Response

from aserve.errors import InvalidRequestError
from aserve.messages.inputs import OutputKind
from aserve.messages.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from aserve.server import sse
from aserve.server.connection import EventStream
from aserve.server.direct import LiveEvents
from aserve.server.errors import error_event
from aserve.server.openai import generation, prompts
from aserve.server.openai.generation import Envelope, Streams, Usage
from aserve.server.openai.logprobs import LegacyLogprobs
from aserve.server.openai.models import served_model
from aserve.server.openai.prompts import Prompt
from aserve.server.openai.protocol import CompletionBody, read
from aserve.server.service import log_client_id, new_id, service

blueprint = Blueprint("completions", __name__)


@blueprint.post("/v1/completions")
async def create_completion() -> Response:
    body = await read(CompletionBody)
    shared = service()
    engine = await shared.ready_engine()
    model = served_model(engine, body.model)
    limits = engine.model_config
    body.check(vocab_size=limits.vocab_size, max_num_seqs=engine.config.scheduler.max_num_seqs)
    if body.suffix is not None:
        raise InvalidRequestError("suffix is not supported", param="suffix")
    prompts.check_logprobs(body.logprobs, limits.max_logprobs, "logprobs")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequestError("max_tokens 0 needs echo", param="max_tokens")

    options = body.options()

    items = prompts.split(body.prompt)
    await engine.check_room()
    asked = await prompts.tokenise_all(
        engine,
        items,
        add_special_tokens=body.add_special_tokens,
        truncate=body.truncate_prompt_tokens,
        want_text=body.echo,
    )
    params = []
    for prompt in asked:
        budget = prompts.output_budget(len(prompt.ids), body.max_tokens, limits.max_model_len)
        params.append(
            body.sampling_params(
                max_tokens=max(budget, 1),
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo else None,
            )
        )

    request_id = new_id("cmpl")
    log_client_id(request_id)
    first_texts = await _first_texts(engine, asked) if body.echo and body.logprobs is not None else []
    # The best of several is known only at the end.
    whole = not body.stream or body.use_beam_search or params[0].best_of != body.n
    kind = OutputKind.FINAL_ONLY if whole else OutputKind.DELTA
    streams = await generation.submit(engine, request_id, asked, params, kind, options)
    envelope = Envelope.new(request_id, "text_completion", model)
    call = _Call(body, envelope, asked, first_texts)
    if not body.stream:
        with closing(streams):
            answer = call.response(await streams.finals())
        return Response(orjson.dumps(answer), content_type="application/json")
    events = call.one_event(streams) if whole else LiveEvents(streams, call, shared.courier)
    return EventStream(events, on_close=streams.close)


async def _first_texts(engine: Any, asked: list[Prompt]) -> list[str]:
    """Text of every prompt's first token, which nothing predicts and so no logprob names."""
    tokenizer = await prompts.tokenizer_of(engine)
    return [tokenizer.decode(prompt.ids[:1]) for prompt in asked]


class _Choice:
    """One choice on its way out, in as many pieces as it comes."""

    def __init__(self, index: int, body: CompletionBody, prompt: Prompt, first_text: str) -> None:
        self.index = index
        self.finished = False
        self._body = body
        self._prompt = prompt
        self._first_text = first_text
        self._echo_due = body.echo
        self._logprobs = LegacyLogprobs() if body.logprobs is not None else None
        self._template: sse.Template | None = None

    @property
    def begun(self) -> bool:
        """Whether the echo, if one was asked for, is out."""
        return not self._echo_due

    def template(self, wrap: Callable[[dict[str, Any]], dict[str, Any]]) -> sse.Template:
        """Chunks of this choice that hold text and nothing else; ``wrap`` makes a chunk of a piece."""
        if self._template is None:
            self._template = sse.Template(lambda text: wrap(self._piece(text, None, None, None)))
        return self._template

    def piece(self, result: RequestOutput, output: CompletionOutput) -> dict[str, Any]:
        self.finished = output.finished()
        prompt_only = self._body.max_tokens == 0
        text = "" if prompt_only else output.text
        ids = [] if prompt_only else list(output.token_ids)
        positions: list[TokenLogprobs | None] = [] if prompt_only else list(output.logprobs or [])
        if self._echo_due:
            self._echo_due = False
            text = (self._prompt.text or "") + text
            if self._logprobs is not None:
                ids = [*result.prompt_token_ids, *ids]
                positions = [*(result.prompt_logprobs or []), *positions]
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._logprobs.format(ids, positions, self._first_text)
        return self._piece(text, logprobs, output.finish_reason, output.stop_reason)

    def _piece(
        self,
        text: str,
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
        stop_reason: int | str | None,
    ) -> dict[str, Any]:
        return {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }


class _Call:
    """Turns the outputs of one call into its response or its events."""

    def __init__(
        self, body: CompletionBody, envelope: Envelope, asked: list[Prompt], first_texts: list[str]
    ) -> None:
        self._body = body
        self._envelope = envelope
        # Chunks that hold text and nothing else that changes are made from templates.
        self._plain = body.logprobs is None and not body.continuous_usage and body.max_tokens != 0
        self._usage = Usage(sum(len(prompt.ids) for prompt in asked))
        texts = first_texts or [""] * len(asked)
        self._choices = [
            [_Choice(i * body.n + k, body, prompt, texts[i]) for k in range(body.n)]
            for i, prompt in enumerate(asked)
        ]

    def response(self, results: list[RequestOutput]) -> dict[str, Any]:
        """The whole answer; ``results`` hold the whole output of each prompt."""
        pieces = []
        for index, (choices, result) in enumerate(zip(self._choices, results, strict=True)):
            self._usage.see(index, result)
            # Positions in the result and not output.index, which skips with best_of > n.
            for choice, output in zip(choices, result.outputs, strict=False):
                self._usage.completion_tokens += len(output.token_ids)
                pieces.append(choice.piece(result, output))
        return {**self._envelope.wrap(pieces), "usage": self._usage.as_dict()}

    async def one_event(self, streams: Streams) -> AsyncIterator[bytes]:
        try:
            yield sse.event(self.response(await streams.finals()))
        except Exception as error:  # after the head, every failure is an event
            yield error_event(error)
        finally:
            streams.close()
        yield sse.DONE

    def events_of(self, prompt_index: int, result: RequestOutput) -> bytes:
        prompt_only = self._body.max_tokens == 0
        self._usage.see(prompt_index, result)
        found = []
        for output in result.outputs:
            choice = self._choices[prompt_index][output.index]
            if choice.finished or not _news(output, prompt_only):
                continue
            self._usage.completion_tokens += len(output.token_ids)
            if self._plain and choice.begun and output.finish_reason is None:
                found.append(choice.template(self._chunk).fill(output.text))
            else:
                found.append(sse.event(self._chunk(choice.piece(result, output))))
        return found[0] if len(found) == 1 else b"".join(found)

    def ending(self) -> bytes:
        if not self._body.include_usage:
            return b""
        return sse.event({**self._envelope.wrap([]), "usage": self._usage.as_dict()})

    def _chunk(self, piece: dict[str, Any]) -> dict[str, Any]:
        chunk = self._envelope.wrap([piece])
        if self._body.include_usage:
            chunk["usage"] = self._usage.as_dict() if self._body.continuous_usage else None
        return chunk


def _news(output: CompletionOutput, prompt_only: bool) -> bool:
    """Whether an output is worth a chunk: it has tokens or text, or it is the last."""
    return output.finished() or (not prompt_only and bool(output.token_ids or output.text))
