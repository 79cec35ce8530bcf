"""KV blocks on their way between the device and host memory, beside the computation."""

from __future__ import annotations

import numpy as np
import torch

from aserve import ops
from aserve.attention.base import KVCache
from aserve.ops import cuda
from aserve.worker.accelerator import Accelerator
from aserve.worker.staging import Upload

_PIECE_BYTES = 64 << 20
"""Device memory that blocks pass through on their way, once for each direction."""

_CHUNK_BYTES = 256 << 20


class BlockMover:
    """Copies blocks of all layers: to host memory and back, and within the device.

    In host memory a block is one piece with all its layers, pinned, so that each takes one copy. That copy,
    the slow part, runs on the side stream; the compute stream only gathers blocks into staging memory, or
    scatters them from there. So what it computes next may write to a block that is still on its way out.
    """

    def __init__(self, accelerator: Accelerator, caches: list[KVCache], num_swap_blocks: int) -> None:
        self._accelerator = accelerator
        self._caches = caches
        self._sides = [side for cache in caches for side in cache]
        self._sizes = [side[0].numel() for side in self._sides]
        dtype = self._sides[0].dtype
        self._by_kernel = len({side.shape for side in self._sides}) == 1 and cuda.serves(
            "copy_blocks", dtype, dtype, accelerator.device.index or 0
        )
        """Whether one kernel copies blocks of all layers, which must then be alike."""
        self.block_bytes = sum(self._sizes) * self._sides[0].element_size()
        self._piece = max(1, _PIECE_BYTES // self.block_bytes)
        self.num_swap_blocks = num_swap_blocks
        if not num_swap_blocks:
            return
        shape = (min(self._piece, num_swap_blocks), sum(self._sizes))
        self._piece = shape[0]
        self._leaving = torch.empty(shape, dtype=dtype, device=accelerator.device)
        self._coming = torch.empty(shape, dtype=dtype, device=accelerator.device)
        self.host: list[torch.Tensor] = []
        """Each swap block, all its layers."""
        while len(self.host) < num_swap_blocks:
            # In chunks: torch takes pinned memory in powers of two, and would take nearly twice as much.
            count = min(max(1, _CHUNK_BYTES // self.block_bytes), num_swap_blocks - len(self.host))
            chunk = accelerator.pinned(count * self.block_bytes)[: count * self.block_bytes]
            self.host += chunk.view(dtype).view(count, shape[1]).unbind(0)
        # Set whenever the side stream has left the staging memory alone again.
        self._left, self._came = accelerator.event(), accelerator.event()
        for event in (self._left, self._came):
            event.record(accelerator.side)

    @staticmethod
    def staging_bytes(block_bytes: int, num_swap_blocks: int) -> int:
        """Device memory that it takes for itself."""
        return 2 * block_bytes * min(max(1, _PIECE_BYTES // block_bytes), num_swap_blocks)

    def move_out(self, pairs: list[tuple[int, int]], blocks: torch.Tensor) -> None:
        """``(block, swap block)``; ``blocks`` are the former on the device, int64."""
        accelerator = self._accelerator
        for first in range(0, len(pairs), self._piece):
            part = pairs[first : first + self._piece]
            index = blocks[first : first + len(part)]
            self._left.wait(accelerator.compute)
            for side, view in self._views(self._leaving, len(part)):
                view.copy_(side.index_select(0, index))
            gathered = accelerator.event()
            gathered.record(accelerator.compute)
            with accelerator.on(accelerator.side):
                gathered.wait(accelerator.side)
                for place, (_, swap_block) in enumerate(part):
                    self.host[swap_block].copy_(self._leaving[place], non_blocking=True)
                self._left.record(accelerator.side)

    def move_in(self, pairs: list[tuple[int, int]], blocks: torch.Tensor) -> None:
        """``(swap block, block)``; ``blocks`` are the latter on the device, int64."""
        accelerator = self._accelerator
        for first in range(0, len(pairs), self._piece):
            part = pairs[first : first + self._piece]
            index = blocks[first : first + len(part)]
            with accelerator.on(accelerator.side):
                self._came.wait(accelerator.side)
                for place, (swap_block, _) in enumerate(part):
                    self._coming[place].copy_(self.host[swap_block], non_blocking=True)
                arrived = accelerator.event()
                arrived.record(accelerator.side)
            arrived.wait(accelerator.compute)
            for side, view in self._views(self._coming, len(part)):
                side.index_copy_(0, index, view)
            self._came.record(accelerator.compute)

    def pack(self, pairs: list[tuple[int, int]], upload: Upload) -> list[tuple[int, int]]:
        """Adds to the upload what :meth:`copy` needs for ``(source, destination)`` copies in the device."""
        return [] if self._by_kernel else pack_copies(pairs, upload)

    def copy(self, pairs: list[tuple[int, int]], upload: Upload, sections: list[tuple[int, int]]) -> None:
        """Copies blocks within the device, in order. sections: what :meth:`pack` gave for the pairs."""
        if self._by_kernel:
            ops.copy_blocks(self._caches, pairs)
            return
        for source, destination in sections:
            for side in self._sides:
                side.index_copy_(0, upload[destination], side.index_select(0, upload[source]))

    def _views(self, staging: torch.Tensor, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's keys or values beside their place in the staging memory."""
        views = []
        start = 0
        for side, size in zip(self._sides, self._sizes, strict=True):
            part = staging[:count, start : start + size]
            views.append((side, part.view(count, *side.shape[1:])))
            start += size
        return views


def pack_copies(pairs: list[tuple[int, int]], upload: Upload) -> list[tuple[int, int]]:
    """Adds ``(source, destination)`` block copies to the upload, in groups that may be done at once: those
    of one group read nothing and write nothing that another of them writes."""
    groups: list[list[tuple[int, int]]] = []
    written: set[int] = set()
    for source, destination in pairs:
        if not groups or source in written or destination in written:
            groups.append([])
            written = set()
        groups[-1].append((source, destination))
        written.add(destination)
    sections = []
    for group in groups:
        index = np.array(group, dtype=np.int64)
        sections.append((upload.add(index[:, 0]), upload.add(index[:, 1])))
    return sections
