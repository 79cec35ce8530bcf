"""Decode steps captured as graphs, one for each size of batch that is padded to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from aserve import ops
from aserve.attention.base import AttentionMetadata
from aserve.ops import cuda
from aserve.worker.accelerator import Accelerator, Graph
from aserve.worker.device_batch import DeviceBatch
from aserve.worker.staging import Staging

logger = logging.getLogger(__name__)

GATHERED_BYTES = 512 << 20
"""Most memory for a layer's keys and values where captured attention gathers them all, as torch's does."""

Forward = Callable[[torch.Tensor, torch.Tensor, AttentionMetadata], torch.Tensor]
"""Token ids, positions and metadata to hidden states."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """Of each row of a step: logits float32 ``[B, V]``, the likeliest token int64 ``[B]`` and its
    log-probability float32 ``[B]``."""

    logits: torch.Tensor
    token_ids: torch.Tensor
    logprobs: torch.Tensor


_LARGEST = 256
"""Larger batches keep the device busy without a graph."""


def batch_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, and then every multiple of 8 up to the first that holds ``max_num_seqs``, or to 256."""
    most = min(max_num_seqs, _LARGEST)
    sizes = [1, 2, 4, *range(8, _LARGEST + 1, 8)]
    return sizes[: 1 + next(at for at, size in enumerate(sizes) if size >= most)]


def gathers(shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether captured attention gathers all of a row's keys and values, for want of a kernel that reads
    them where they are. shapes: KV heads and head size of each layer."""
    served = cuda.serves("paged_attention", dtype, dtype, device.index or 0)
    return not served or any(size % 8 or size > 256 for _, size in shapes)


def gathered_sizes(sizes: list[int], row_bytes: int) -> list[int]:
    """The sizes whose rows, of so many bytes of keys and values in a layer, torch may gather at once."""
    return [size for size in sizes if size * row_bytes <= GATHERED_BYTES]


class DecodeGraphs:
    """Graphs of steps in which every row computes one token.

    A graph does all from slots and positions to logits, and reads both, int64 ``[size]`` each, at the
    beginning of the staging memory; everything else it needs is on the device. Attention is told
    ``longest`` for the length of all sequences, and reads the true ones from the device. Rows past the
    batch are the idle slot's.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        batch: DeviceBatch,
        staging: Staging,
        forward: Forward,
        logits: Callable[[torch.Tensor], torch.Tensor],
        longest: int,
    ) -> None:
        self._accelerator = accelerator
        self._batch = batch
        self._staging = staging
        self._forward = forward
        self._logits = logits
        self.longest = longest
        self._graphs: dict[int, Graph[Decoded]] = {}
        self._query_start = torch.empty(0)

    def capture(self, sizes: list[int]) -> None:
        """Captures a graph of each size, the largest first: the others find room in its memory."""
        for size in sorted(sizes, reverse=True):
            # Once as it is: libraries choose and load their kernels the first time, and may not in a capture.
            self.run_idle(size)
            self._graphs[size] = self._accelerator.capture(partial(self._step, *self._rows(size)))

    def run_idle(self, size: int) -> None:
        """Queues what a graph of that size does, for rows that are all idle."""
        if size >= len(self._query_start):
            self._query_start = torch.arange(size + 1, dtype=torch.int32, device=self._accelerator.device)
        slots, positions = self._rows(size)
        slots.fill_(self._batch.idle_slot)
        positions.zero_()
        self._step(slots, positions)

    @property
    def sizes(self) -> list[int]:
        return sorted(self._graphs)

    def fitting(self, num_rows: int, longest: int) -> int | None:
        """The smallest size that holds so many rows, the longest of them of ``longest`` tokens."""
        if longest > self.longest:
            return None
        return min((size for size in self._graphs if size >= num_rows), default=None)

    def row_bytes(self, size: int) -> int:
        """How many bytes a graph reads at the beginning of the staging memory."""
        return 2 * 8 * size

    def replay(self, size: int) -> Decoded:
        """Queues the step whose rows are in the staging memory; its results last until the next replay."""
        graph = self._graphs[size]
        graph.replay()
        return graph.result

    def _step(self, slots: torch.Tensor, positions: torch.Tensor) -> Decoded:
        starts = self._query_start[: len(slots) + 1]
        inputs = self._batch.decode_inputs(slots, positions, starts, self.longest, graph=True)
        logits = self._logits(self._forward(*inputs))
        return Decoded(logits, *ops.greedy_logprob(logits))

    def _rows(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._staging.memory[: self.row_bytes(size)].view(torch.int64)
        return rows[:size], rows[size:]
