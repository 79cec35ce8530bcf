"""AsyncLLMEngine: a stream per request over one background loop."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.to_thread

from aserve.args import AsyncEngineArgs, EngineArgs
from aserve.config.decoding import DecodingConfig
from aserve.config.engine import EngineConfig
from aserve.config.model import ModelConfig
from aserve.engine import loop, pooling
from aserve.engine.llm_engine import LLMEngine
from aserve.engine.pool import BoundedPool
from aserve.engine.report import facts
from aserve.engine.stats import EngineStats
from aserve.engine.stream import Mailbox, OutputStream
from aserve.engine.watch import Progress, watch_loop_lag
from aserve.errors import (
    AserveError,
    EngineBusyError,
    EngineDeadError,
    InvalidRequestError,
    RequestFailedError,
)
from aserve.guided.base import Grammar, GrammarError
from aserve.log import RequestLog
from aserve.messages.inputs import (
    LoRARequest,
    MultiModalData,
    OutputKind,
    PoolingParams,
    PromptInputs,
    RequestOptions,
    UsageContext,
)
from aserve.messages.outputs import EmbeddingRequestOutput, RequestOutput
from aserve.messages.params import GuidedParams, SamplingParams

logger = logging.getLogger(__name__)

_INLINE_CHARS = 4096
"""Longer texts are tokenised in a thread, so that one long prompt does not stall every stream."""

_MOST_LONG = 64
"""Long texts that may be tokenised and wait for it at once."""


class AsyncLLMEngine:
    """Serves many requests at once on one event loop.

    The engine is built by :meth:`start` (weights load in a thread), or by the first request when
    ``start_engine_loop`` is set. All methods belong to the loop that started it.
    """

    def __init__(
        self,
        worker_use_ray: bool,
        engine_use_ray: bool,
        *args: Any,
        log_requests: bool = True,
        max_log_len: int | None = None,
        start_engine_loop: bool = True,
        **kwargs: Any,
    ) -> None:
        if worker_use_ray or engine_use_ray:
            name = "worker_use_ray" if worker_use_ray else "engine_use_ray"
            raise ValueError(f"{name} is not available in this release; leave it False")
        self._engine_args = (args, kwargs)
        self._from_config: tuple[EngineConfig, bool, UsageContext] | None = None
        self._setup(log_requests, max_log_len, start_engine_loop)

    def _setup(self, log_requests: bool, max_log_len: int | None, start_engine_loop: bool) -> None:
        self.engine: LLMEngine | None = None
        self.failed: EngineDeadError | None = None
        self.start_engine_loop = start_engine_loop
        self.on_dead: Callable[[], None] | None = None
        """Called once, from the loop, when the engine has failed for good; not when it is stopped."""
        self.progress = Progress()
        self._request_log = RequestLog(enabled=log_requests, max_log_len=max_log_len)
        self._refusal: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._lag_watch: asyncio.Task[None] | None = None
        self._starting: asyncio.Lock | None = None
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._tokenizing = 0
        self._tokenisers = BoundedPool("aserve-tokenise", workers=2, most=_MOST_LONG)

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs,
        start_engine_loop: bool = True,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
    ) -> AsyncLLMEngine:
        """Checks the arguments. Weights are not read before :meth:`start` or the first request."""
        quiet = isinstance(engine_args, AsyncEngineArgs) and engine_args.disable_log_requests
        return cls.from_config(
            engine_args.create_engine_config(),
            log_stats=not engine_args.disable_log_stats,
            log_requests=not quiet,
            max_log_len=engine_args.max_log_len if isinstance(engine_args, AsyncEngineArgs) else None,
            start_engine_loop=start_engine_loop,
            usage_context=usage_context,
        )

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        *,
        log_stats: bool = True,
        log_requests: bool = True,
        max_log_len: int | None = None,
        start_engine_loop: bool = True,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
    ) -> AsyncLLMEngine:
        """The same for a configuration that has been checked already."""
        self = cls.__new__(cls)
        self._engine_args = ((), {})
        self._from_config = (config, log_stats, usage_context)
        self._setup(log_requests, max_log_len, start_engine_loop)
        return self

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """Loads the model and starts the background loop. Raises what loading raised."""
        if self.failed is not None:
            raise self.failed
        if self._starting is None:
            self._starting = asyncio.Lock()
        async with self._starting:
            if self.engine is None:
                self.engine = await anyio.to_thread.run_sync(self._build)
                self.engine.output.request_log = self._request_log
            if self._task is None:
                self.start_background_loop()

    def start_background_loop(self) -> None:
        """Starts the loop of an engine that is already loaded. RuntimeError if it is running."""
        if self.failed is not None:
            raise self.failed
        if self._task is not None:
            raise RuntimeError("the background loop is already running")
        if self.engine is None:
            raise RuntimeError("the engine is not loaded yet; await start() instead")
        self._task = asyncio.create_task(self._run(self.engine), name="aserve-engine-loop")
        _count_tasks(self.engine.stats)
        self._lag_watch = asyncio.create_task(self._watch(self.engine), name="aserve-watch")

    def _build(self) -> LLMEngine:
        if self._from_config is not None:
            return LLMEngine.from_config(*self._from_config)
        args, kwargs = self._engine_args
        return LLMEngine(*args, **kwargs)

    async def stop(self) -> None:
        """Ends the loop and the executor; open streams end with EngineDeadError. Idempotent."""
        tasks = [task for task in (self._task, self._lag_watch) if task is not None and not task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        # A cancelled task keeps its traceback, whose frames would keep the engine alive.
        self._task = self._lag_watch = None
        if self.failed is None:
            self._die(EngineDeadError("the engine has been stopped"))
        self._tokenisers.close()
        if self.engine is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self.engine.close)

    async def _watch(self, engine: LLMEngine) -> None:
        async for _ in watch_loop_lag(engine.stats):
            self.progress.look(engine.core.num_steps, engine.core.num_unfinished, time.monotonic())

    async def _run(self, engine: LLMEngine) -> None:
        try:
            await loop.run(engine, self._wait_for_work, engine.config.scheduler.overlap)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            logger.critical("the engine loop has failed", exc_info=error)
            dead = EngineDeadError(f"the engine loop has failed: {type(error).__name__}: {error}")
            dead.__cause__ = error
            self._die(dead)
            if self.on_dead is not None:
                self.on_dead()

    async def _wait_for_work(self) -> None:
        if not self.num_unfinished:
            self._set_idle()
        self._work.clear()
        await self._work.wait()

    def _die(self, error: EngineDeadError) -> None:
        """Remembers why the engine ended and tells every open stream."""
        self.failed = error
        if self.engine is not None:
            for request_id in list(self.engine.output.states):
                self.engine.fail_request(request_id, error, "engine_dead")
        self._set_idle()

    def _set_idle(self) -> None:
        if not self._tokenizing:
            self._idle.set()

    @property
    def ready(self) -> bool:
        """Whether a request would be accepted now."""
        return self.is_running and self._refusal is None

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done() and self.failed is None

    @property
    def is_stopped(self) -> bool:
        return self.failed is not None or (self._task is not None and self._task.done())

    @property
    def errored(self) -> bool:
        return self.failed is not None

    def stalled_for(self) -> float:
        """Seconds for which requests have been unfinished and no step has been made; 0 when idle."""
        return self.progress.stalled_for(time.monotonic())

    async def check_health(self) -> None:
        """Raises EngineDeadError if the engine cannot serve any more."""
        self.check()

    def check(self) -> None:
        """The same at once."""
        if self.failed is not None:
            raise self.failed
        if self.engine is not None:
            self.engine.check_health()

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
            return await asyncio.shield(asyncio.wrap_future(guides.start(guided)))
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

    @property
    def num_unfinished(self) -> int:
        return 0 if self.engine is None else self.engine.get_num_unfinished_requests()

    @property
    def config(self) -> EngineConfig:
        if self._from_config is not None:
            return self._from_config[0]
        if self.engine is None:
            raise EngineDeadError("the engine is not loaded yet")
        return self.engine.config

    @property
    def model_config(self) -> ModelConfig:
        return self.config.model

    @property
    def stats(self) -> EngineStats | None:
        return None if self.engine is None else self.engine.stats

    async def get_tokenizer(self) -> Any:
        return (await self._serving()).get_tokenizer()

    async def get_model_config(self) -> ModelConfig:
        return self.model_config

    async def get_decoding_config(self) -> DecodingConfig:
        return self.config.decoding

    async def do_log_stats(self) -> None:
        if self.engine is not None:
            self.engine.do_log_stats()


def _count_tasks(stats: EngineStats) -> None:
    """Has every rendering of the metrics count the running loop's tasks."""
    loop, refresh = asyncio.get_running_loop(), stats.refresh

    def refresh_all() -> None:
        if refresh is not None:
            refresh()
        stats.set_tasks(len(asyncio.all_tasks(loop)))

    stats.refresh = refresh_all
