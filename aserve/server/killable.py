"""Runs a program that came with a model, which may never end, without waiting for it longer than allowed."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from aserve.errors import QueueFullError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PATIENCE = 10
"""How many times its seconds a function may take by the clock: on a crowded machine it is not its fault."""


class _Stop(BaseException):
    """Raised inside the thread whose time is up. No ``except Exception`` of the program catches it."""


class KillableThreads:
    """Gives each call a thread of its own, so that one can be ended without harm to any other.

    most: calls that may run at once; a further one is refused.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self.running = 0

    async def run(self, function: Callable[[], Result], seconds: float) -> Result:
        """The function's result. Raises TimeoutError once it has computed for ``seconds``, or after PATIENCE
        times as many; QueueFullError, and does not run it, if too many are running.

        An overdue function is stopped at its next bytecode. It keeps its place until it is.
        """
        if self.running >= self._most:
            raise QueueFullError(f"{self.running} conversations are being rendered already")
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Result] = loop.create_future()

        def settle(result: Result | None, error: BaseException | None) -> None:
            self.running -= 1
            if outcome.done():
                return
            if error is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(result)  # type: ignore[arg-type]

        clock: list[int] = []

        def body() -> None:
            # Hazard: a thread that has ended may not be asked for its clock, but its clock for the time.
            if hasattr(time, "pthread_getcpuclockid"):
                clock.append(time.pthread_getcpuclockid(threading.get_ident()))
            result: Result | None = None
            failure: BaseException | None = None
            try:
                result = function()
            except _Stop:
                failure = TimeoutError()
            except BaseException as error:
                failure = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, failure)

        thread = threading.Thread(target=body, name=self._name, daemon=True)
        self.running += 1
        thread.start()
        try:
            await _until_done_or_overdue(outcome, clock, seconds)
            return outcome.result()
        finally:
            if thread.is_alive() and not (outcome.done() and not outcome.cancelled()):
                _stop(thread)


async def _until_done_or_overdue(outcome: asyncio.Future[Result], clock: list[int], seconds: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE * seconds
    left = seconds
    while left > 0 and (now := loop.time()) < deadline:
        done, _ = await asyncio.wait([outcome], timeout=min(max(left, 0.01), deadline - now))
        if done:
            return
        left = seconds - _computed(clock, seconds)
    raise TimeoutError


def _computed(clock: list[int], otherwise: float) -> float:
    """Seconds of CPU time by a thread's clock; ``otherwise`` where the system has none."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return otherwise
    try:
        return time.clock_gettime(clock[0]) if clock else 0.0
    except OSError:  # the thread has ended: its outcome is on the way
        return 0.0


def _stop(thread: threading.Thread) -> None:
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Stop))
