"""The life of an AsyncLLMEngine: loading, the background loop, health, and its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Self

import anyio
import anyio.to_thread

from aserve.args import AsyncEngineArgs, EngineArgs
from aserve.config.engine import EngineConfig
from aserve.config.model import ModelConfig
from aserve.engine import loop
from aserve.engine.llm_engine import LLMEngine
from aserve.engine.pool import BoundedPool
from aserve.engine.stats import EngineStats
from aserve.engine.watch import Progress, watch_loop_lag
from aserve.errors import EngineDeadError
from aserve.log import RequestLog
from aserve.messages.inputs import UsageContext

logger = logging.getLogger(__name__)

_MOST_LONG = 64
"""Long texts that may be tokenised and wait for it at once."""


class EngineLife:
    """An LLMEngine, its loop in the background, and what is known of both; requests are a subclass's."""

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
    ) -> Self:
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
    ) -> Self:
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
        self.engine.output.request_log = self._request_log
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


def _count_tasks(stats: EngineStats) -> None:
    """Has every rendering of the metrics count the running loop's tasks."""
    loop, refresh = asyncio.get_running_loop(), stats.refresh

    def refresh_all() -> None:
        if refresh is not None:
            refresh()
        stats.set_tasks(len(asyncio.all_tasks(loop)))

    stats.refresh = refresh_all
