"""AsyncLLMEngine: a stream per request over one background loop."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from aserve.config.decoding import DecodingConfig
from aserve.config.model import ModelConfig
from aserve.engine import pooling
from aserve.engine.life import EngineLife
from aserve.engine.llm_engine import LLMEngine
from aserve.engine.report import facts
from aserve.engine.stream import Mailbox, OutputStream
from aserve.errors import (
    AserveError,
    EngineBusyError,
    EngineDeadError,
    InvalidRequestError,
    RequestFailedError,
)
from aserve.guided.base import Grammar, GrammarError
from aserve.messages.inputs import (
    LoRARequest,
    MultiModalData,
    OutputKind,
    PoolingParams,
    PromptInputs,
    RequestOptions,
)
from aserve.messages.outputs import EmbeddingRequestOutput, RequestOutput
from aserve.messages.params import GuidedParams, SamplingParams

_INLINE_CHARS = 4096
"""Longer texts are tokenised in a thread, so that one long prompt does not stall every stream."""


class AsyncLLMEngine(EngineLife):
    """Serves many requests at once on one event loop.

    The engine is built by :meth:`start` (weights load in a thread), or by the first request when
    ``start_engine_loop`` is set. All methods belong to the loop that started it.
    """

    # ---------------------------------------------------------------- requests

    async def submit(
        self,
        inputs: PromptInputs | None,
        params: SamplingParams | PoolingParams,
        *,
        request_id: str | None = None,
        prompt_token_ids: list[int] | None = None,
        lora_request: LoRARequest | None = None,
        multi_modal_data: MultiModalData | None = None,
        kind: OutputKind = OutputKind.DELTA,
        arrival_time: float | None = None,
        options: RequestOptions | None = None,
    ) -> OutputStream:
        """Validates, tokenises and queues a request; returns its stream.

        The stream of a request with PoolingParams, which needs FINAL_ONLY, has one EmbeddingRequestOutput.
        Raises InvalidRequestError for bad input, QueueFullError when too many requests wait,
        EngineBusyError while draining, EngineDeadError when the engine has ended, KeyError for an id
        already in use. The caller must read or close the stream.
        """
        arrival_time = time.time() if arrival_time is None else arrival_time
        engine = await self._serving()
        params = engine.input.check_params(params)
        if isinstance(params, PoolingParams) and kind is not OutputKind.FINAL_ONLY:
            raise InvalidRequestError(
                "PoolingParams are for encode: a vector comes whole (kind FINAL_ONLY)", param="params"
            )
        engine.check_room(self._tokenizing)
        text, ids = engine.input.split(inputs, prompt_token_ids)
        if ids is None:
            ids = await self._encode(engine, text or "", True)
            self._check_open()  # draining may have begun, or the engine died, meanwhile
        grammar = None
        if isinstance(params, SamplingParams) and params.guided is not None:
            grammar = await self._compile(engine, params.guided)
            self._check_open()
        request_id = request_id or uuid.uuid4().hex
        group = engine.input.make_group(
            request_id, text, ids, params, arrival_time, lora_request, multi_modal_data, options, grammar
        )
        mailbox = Mailbox(kind)
        self._request_log.accepted(
            request_id, prompt=text, prompt_token_ids=ids, params=params, lora_request=lora_request
        )
        engine.queue(group, kind, mailbox.put, mailbox)
        if engine.output.tracer is not None:
            engine.output.tracer.began(request_id)
        self._idle.clear()
        self._work.set()
        return OutputStream(request_id, mailbox, self._abort_now)

    async def generate(
        self,
        inputs: PromptInputs | None,
        sampling_params: SamplingParams,
        request_id: str,
        prompt_token_ids: list[int] | None = None,
        lora_request: LoRARequest | None = None,
        multi_modal_data: MultiModalData | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yields the request's cumulative output after every step that changed it.

        Leaving the iteration early, by any means, aborts the request.
        """
        stream = await self.submit(
            inputs,
            sampling_params,
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            lora_request=lora_request,
            multi_modal_data=multi_modal_data,
            kind=OutputKind.CUMULATIVE,
        )
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def encode(
        self, inputs: PromptInputs | None, pooling_params: PoolingParams, request_id: str, **options: Any
    ) -> AsyncIterator[EmbeddingRequestOutput]:
        """Yields the prompt's vector, once; ``options`` are the further arguments of :meth:`generate`.

        Leaving the iteration early aborts the request.
        """
        kind = OutputKind.FINAL_ONLY
        stream = await self.submit(inputs, pooling_params, request_id=request_id, kind=kind, **options)
        try:
            async for output in stream:
                yield pooling.checked(output)
        finally:
            stream.close()

    async def abort(self, request_id: str) -> None:
        """Ends a request; its stream ends without another output. Unknown ids are ignored."""
        if self.failed is not None:
            raise self.failed
        if self.engine is not None:
            state = self.engine.output.states.get(request_id)
            if state is not None and state.mailbox is not None:
                state.mailbox.end()
            self._abort_now(request_id)

    def _abort_now(self, request_id: str, cause: str = "caller") -> None:
        if self.engine is None or self.failed is not None:
            return
        self.engine.abort_request(request_id, cause)
        if not self.num_unfinished:
            self._set_idle()
        # Freed blocks or slots may let a waiting request in.
        self._work.set()

    async def check_room(self) -> None:
        """Raises QueueFullError if a new request would be refused: ask before working on its prompt."""
        (await self._serving()).check_room(self._tokenizing)

    @property
    def longest_text(self) -> int | None:
        """Characters that a prompt may have to fit the context; None if any may, or it is not known yet."""
        return None if self.engine is None else self.engine.input.longest_text

    async def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; long texts are tokenised off the loop.

        Raises InvalidRequestError, before it is tokenised, for a text that cannot fit the model's context.
        """
        engine = await self._serving()
        if engine.input.is_doubtful(text):
            await self._tokenisers.run(engine.input.check_fits, text)
        return await self._encode(engine, text, add_special_tokens)

    async def _encode(self, engine: LLMEngine, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) <= _INLINE_CHARS:
            return engine.input.encode(text, add_special_tokens)
        self._tokenizing += 1
        self._idle.clear()
        try:
            return await self._tokenisers.run(engine.input.encode, text, add_special_tokens)
        finally:
            self._tokenizing -= 1
            if not self.num_unfinished:
                self._set_idle()

    def warm_guides(self) -> None:
        """Gets ready, in the background, for the first guided request, which would wait for it."""
        if self.engine is not None:
            self.engine.input.guides.warm()

    async def _compile(self, engine: LLMEngine, guided: GuidedParams) -> Grammar:
        guides = engine.input.guides
        self._tokenizing += 1
        self._idle.clear()
        try:
            # Shielded: another request may wait for the same grammar.
            compiled = asyncio.wrap_future(guides.start(guided))
            # Looked at here, or asyncio would report it where the caller has left meanwhile.
            compiled.add_done_callback(lambda done: done.cancelled() or done.exception())
            return await asyncio.shield(compiled)
        except (GrammarError, InvalidRequestError) as error:
            raise guides.error(guided, error) from None
        finally:
            self._tokenizing -= 1
            if not self.num_unfinished:
                self._set_idle()

    async def _serving(self) -> LLMEngine:
        """The engine, if it takes requests; starts it if that is allowed."""
        self._check_open()
        if not self.is_running:
            if not self.start_engine_loop:
                raise EngineDeadError("the background loop is not running; call start() first")
            await self.start()
            self._check_open()
        if self.engine is None:
            raise EngineDeadError("the engine is not loaded")
        return self.engine

    def _check_open(self) -> None:
        if self.failed is not None:
            raise self.failed
        if self._refusal is not None:
            raise EngineBusyError(self._refusal)

    def unfinished(self) -> list[dict[str, Any]]:
        """What is known of every unfinished request, in numbers: nothing of its prompt or its text."""
        return (
            []
            if self.engine is None
            else [facts(group, time.time()) for group in self.engine.core.groups.values()]
        )

    def end_request(self, request_id: str, reason: str) -> bool:
        """Ends a request with RequestFailedError(reason); False if there is none of that id."""
        if self.engine is None or request_id not in self.engine.core.groups:
            return False
        self.engine.fail_request(request_id, RequestFailedError(reason), "operator")
        self._work.set()
        if not self.num_unfinished:
            self._set_idle()
        return True

    # ---------------------------------------------------------------- draining

    def refuse_new(self, reason: str) -> None:
        """From now on every new request is refused with EngineBusyError(reason)."""
        self._refusal = reason

    def abort_all(self, reason: str) -> None:
        """Ends every unfinished request with EngineBusyError(reason)."""
        if self.engine is None:
            return
        error: AserveError = EngineBusyError(reason)
        for request_id in list(self.engine.output.states):
            self.engine.fail_request(request_id, error, "shutdown")
        self._work.set()
        self._set_idle()

    async def idle(self) -> None:
        """Returns once no request is unfinished."""
        await self._idle.wait()

    # ---------------------------------------------------------------- facts

    async def get_tokenizer(self) -> Any:
        return (await self._serving()).get_tokenizer()

    async def get_model_config(self) -> ModelConfig:
        return self.model_config

    async def get_decoding_config(self) -> DecodingConfig:
        return self.config.decoding

    async def do_log_stats(self) -> None:
        if self.engine is not None:
            self.engine.do_log_stats()
