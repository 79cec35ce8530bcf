"""An executor without a model: the remembering worker of the core tests, in a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from aserve.config.engine import EngineConfig
from aserve.errors import EngineDeadError
from aserve.executor.base import ExecutorBase
from aserve.messages.step import CacheCapacity, StepPlan, StepResult
from tests.core.memory_worker import MemoryWorker


class FakeExecutor(ExecutorBase):
    """Tokens are hashes of their prefix, drawn from ``3 .. 66``; each step takes ``step_time`` seconds.

    before_step: called with each plan in the executor's thread; may raise (the executor has failed)
        or return a StepResult to use instead.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_blocks: int = 64,
        num_swap_blocks: int = 0,
        max_steps: int = 1,
        step_time: float = 0.0,
        before_step: Callable[[StepPlan], StepResult | None] = lambda plan: None,
    ) -> None:
        super().__init__(config)
        self.num_blocks, self.num_swap_blocks = num_blocks, num_swap_blocks
        self.max_steps = max_steps
        self.interrupted: list[int] = []
        self.step_time = step_time
        self.before_step = before_step
        self.plans = 0
        self.closed = False
        self._worker = MemoryWorker(
            num_blocks, config.cache.block_size, config.scheduler.max_num_seqs, num_swap_blocks
        )
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def start(self) -> Future[CacheCapacity]:
        future: Future[CacheCapacity] = Future()
        future.set_result(
            CacheCapacity(
                self.num_blocks,
                self.num_swap_blocks,
                self.config.scheduler.max_num_seqs,
                max_steps=self.max_steps,
            )
        )
        return future

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        self._jobs.put((plan, future))
        return future

    def interrupt(self, step_id: int) -> None:
        self.interrupted.append(step_id)

    def check_health(self) -> None:
        if self.closed:
            raise EngineDeadError("the executor has been closed")

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._jobs.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            plan, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if self.step_time:
                    time.sleep(self.step_time)
                instead = self.before_step(plan)
                result = self._worker.run(plan)
                self.plans += 1
                future.set_result(instead or result)
            except BaseException as error:
                future.set_exception(error)
