"""One device, in this process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from aserve.config.engine import EngineConfig
from aserve.errors import EngineDeadError
from aserve.executor.base import ExecutorBase
from aserve.messages.step import CacheCapacity, StepPlan, StepResult

if TYPE_CHECKING:
    from aserve.worker.runner import Handle, Runner

_Job = tuple[Callable[[], Any], Future[Any]]


class UniExecutor(ExecutorBase):
    """A launch thread that prepares and launches, and a completion thread that only waits.

    The thread that waits for the device is not the one that launches, so that the preparation of
    step n + 1 overlaps the computation of step n. On a device without a queue of its own (the CPU) a
    launched step is already complete and the second hop is skipped.

    Everything that touches the device, construction included, happens in the launch thread: current
    device, stream and inference mode belong to a thread.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waits: queue.SimpleQueue[tuple[Handle, Future[StepResult]] | None] = queue.SimpleQueue()
        self._worker: Runner | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=_run_jobs, args=(self._jobs,), name="aserve-launch", daemon=True),
            threading.Thread(target=_run_waits, args=(self._waits,), name="aserve-completion", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def start(self) -> Future[CacheCapacity]:
        def build() -> CacheCapacity:
            from aserve.worker.worker import make_runner

            self._worker = make_runner(self.config)
            return self._worker.start()

        future: Future[CacheCapacity] = Future()
        self._put(build, future)
        return future

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        worker = self._worker
        if worker is None:
            raise EngineDeadError("the executor has not been started")
        future: Future[StepResult] = Future()

        def launch() -> Any:
            handle = worker.launch(plan)
            if handle.ready:
                return handle.wait()
            self._waits.put((handle, future))
            return _LATER

        self._put(launch, future)
        return future

    def interrupt(self, step_id: int) -> None:
        if self._worker is not None:
            self._worker.interrupt(step_id)

    def check_health(self) -> None:
        if self._closed or not all(thread.is_alive() for thread in self._threads):
            raise EngineDeadError("the executor is not running")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._jobs.put(None)
        self._threads[0].join()
        self._waits.put(None)
        self._threads[1].join()
        self._worker = None

    def _put(self, job: Callable[[], Any], future: Future[Any]) -> None:
        if self._closed:
            raise EngineDeadError("the executor has been closed")
        self._jobs.put((job, future))


_LATER = object()


def _run_jobs(jobs: queue.SimpleQueue[_Job | None]) -> None:
    # Module-level functions: a running thread must not keep its executor, and the model, alive.
    while (item := jobs.get()) is not None:
        job, future = item
        # From here on the future cannot be cancelled; a loop that is stopped may have done so before.
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = job()
        except BaseException as error:
            future.set_exception(error)
        else:
            if result is not _LATER:
                future.set_result(result)
        del item, job, future


def _run_waits(waits: queue.SimpleQueue[tuple[Handle, Future[StepResult]] | None]) -> None:
    while (item := waits.get()) is not None:
        handle, future = item
        try:
            future.set_result(handle.wait())
        except BaseException as error:
            future.set_exception(error)
        del item, handle, future
