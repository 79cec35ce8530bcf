"""What runners on all devices have in common: loading, and what is worked out of hidden states."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Protocol

import torch

from aserve.attention import route
from aserve.config.engine import EngineConfig
from aserve.messages.step import CacheCapacity, SampleLogprobs, StepPlan, StepResult
from aserve.model.loader import load_model
from aserve.ops.decoder import MAX_STEPS
from aserve.sampling.sampler import SamplerState
from aserve.worker import kv_cache
from aserve.worker.batch_state import ModelInputs, SlotFacts
from aserve.worker.contained import ContainedRows

_LOGITS_BYTES = 64 << 20
"""Most memory that the logits of prompt positions may take at once."""


class Handle(Protocol):
    """A launched step. ``wait`` returns its result, at once if ``ready``."""

    ready: bool

    def wait(self) -> StepResult: ...


class Runner(ABC):
    """Runs plans one after the other; used from one thread only."""

    batch: SlotFacts

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = torch.device(config.device.device)
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)

    @torch.inference_mode()
    def start(self) -> CacheCapacity:
        """Loads the model, allocates the cache, runs one warm-up step."""
        config = self.config
        route.check(self.device)
        phases: dict[str, float] = {}
        clock = _Stopwatch(phases)
        torch.manual_seed(config.model.seed)
        self.model = load_model(config.model, config.load, self.device)
        clock.lap("weights")
        num_slots = config.scheduler.max_num_seqs
        self.sampler = SamplerState(num_slots, config.model.vocab_size, self.device)
        self.rows = ContainedRows(self.sampler)
        block_bytes = kv_cache.bytes_per_block(self.model.kv_shapes, config.cache.block_size, self.dtype)
        num_blocks, num_swap_blocks = self._allocate(block_bytes)
        clock.lap("KV cache")
        self._warm_up()
        clock.lap("warm-up")
        return CacheCapacity(
            num_gpu_blocks=num_blocks,
            num_cpu_blocks=num_swap_blocks,
            num_slots=num_slots,
            max_steps=MAX_STEPS if self.model.greedy_stack is not None else 1,
            phases=phases,
            description={
                "device": str(self.device),
                "dtype": config.model.dtype,
                "KV cache": f"{num_blocks} blocks of {config.cache.block_size} "
                f"({num_blocks * block_bytes / 2**30:.2f} GiB)",
                **self._facts(),
            },
        )

    @abstractmethod
    def launch(self, plan: StepPlan) -> Handle:
        """Runs a plan, or sees to it that it is run."""

    def interrupt(self, step_id: int) -> None:  # noqa: B027 - most have nothing to do
        """Ends plans up to that one after the step they are at. May be called by any thread."""

    @abstractmethod
    def _allocate(self, block_bytes: int) -> tuple[int, int]:
        """Makes the caches and the batch; how many blocks and swap blocks there are."""

    @abstractmethod
    def _warm_up(self) -> None:
        """Makes the first request find everything loaded."""

    @abstractmethod
    def _facts(self) -> dict[str, str]:
        """What the start-up line says of this kind of device."""

    def _prompt_logprobs(
        self, plan: StepPlan, inputs: ModelInputs, hidden: torch.Tensor
    ) -> dict[int, list[SampleLogprobs]] | None:
        piece = max(1, _LOGITS_BYTES // (4 * self.config.model.vocab_size))
        results: dict[int, list[SampleLogprobs]] = {}
        for row in range(len(plan.slots)):
            span = self.batch.prompt_span(plan, row)
            if span is None:
                continue
            count, targets = span
            first = inputs.attention.query_start_host[row]
            entries: list[SampleLogprobs] = []
            for at in range(0, count, piece):
                end = min(at + piece, count)
                # Without a name: the next piece is computed when these logits are gone.
                entries += self.rows.prompt_logprobs(
                    self.model.compute_logits(hidden[first + at : first + end]),
                    targets[at:end],
                    plan.slots[row],
                )
            results[row] = entries
        return results or None


class _Stopwatch:
    def __init__(self, laps: dict[str, float]) -> None:
        self._laps = laps
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now
