"""How a plan reaches the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future

from aserve.config.engine import EngineConfig
from aserve.messages.step import CacheCapacity, StepPlan, StepResult


class ExecutorBase(ABC):
    """Runs plans in the order they are submitted, away from the caller's thread.

    Futures are ``concurrent.futures`` ones: synchronous code waits on them, asynchronous code awaits
    ``asyncio.wrap_future`` of them.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    @abstractmethod
    def start(self) -> Future[CacheCapacity]:
        """Loads the model and allocates the KV cache. Called once, before anything else."""

    @abstractmethod
    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Queues a plan. The future fails only if the executor as a whole has failed."""

    def interrupt(self, step_id: int) -> None:  # noqa: B027 - most have nothing to do
        """Asks plans up to that one to make no further steps than those begun; they may have ended.

        Without effect on an executor that makes one step of every plan.
        """

    @abstractmethod
    def check_health(self) -> None:
        """Raises EngineDeadError if plans can no longer be run."""

    @abstractmethod
    def close(self) -> None:
        """Ends the executor after the plans already submitted. Idempotent."""
