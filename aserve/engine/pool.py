"""Threads for one kind of work that is too long for the event loop, and a bound on what waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from aserve.errors import QueueFullError

Result = TypeVar("Result")


class BoundedPool:
    """Runs functions in ``workers`` threads of its own, made when first needed.

    name: of the threads. most: jobs that may run and wait at once; a further one is refused.
    """

    def __init__(self, name: str, *, workers: int, most: int) -> None:
        self._name = name
        self._workers = workers
        self._most = most
        self._jobs = 0
        self._threads: ThreadPoolExecutor | None = None

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """The function's result. Raises QueueFullError, before any work, if too many jobs are there."""
        if self._jobs >= self._most:
            raise QueueFullError(f"{self._jobs} long prompts are being prepared already")
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix=self._name)
        future = self._threads.submit(function, *args)
        # Counted until the thread is done with it: a caller that leaves does not make it any faster.
        self._jobs += 1
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: _tell(loop, self._done))
        return await asyncio.wrap_future(future)

    def _done(self) -> None:
        self._jobs -= 1

    def close(self) -> None:
        """Drops what has not begun. Idempotent."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
