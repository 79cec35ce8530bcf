"""The numbers of a step on their way to the device, and its results on their way back.

Either way takes one copy a step, between device memory and a pinned buffer that the copy engine reads or
writes while the host goes on. A buffer is used again once the event behind its copy has come.
"""

from __future__ import annotations

import numpy as np
import torch

from aserve.worker.accelerator import Accelerator, Event

_ALIGNMENT = 8


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class PinnedPool:
    """Pinned buffers, used again. May be given back to by another thread than it is taken from by."""

    def __init__(self, accelerator: Accelerator, num_bytes: int) -> None:
        self._accelerator = accelerator
        self._num_bytes = num_bytes
        self._free: list[torch.Tensor] = []
        self.made = 0
        """Buffers there are."""

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer of at least so many bytes, uint8."""
        for _ in range(len(self._free)):
            buffer = self._free.pop()
            if len(buffer) >= num_bytes:
                return buffer
            self.made -= 1  # outgrown: what needed more once will need it again
        self.made += 1
        while self._num_bytes < num_bytes:
            self._num_bytes *= 2
        return self._accelerator.pinned(self._num_bytes)

    def give(self, buffer: torch.Tensor) -> None:
        self._free.append(buffer)


class Staging:
    """Where uploads land on the device.

    memory: uint8, at one address for good: captured graphs read from its beginning. An upload that does not
    fit it gets memory of its own.
    """

    def __init__(self, accelerator: Accelerator, num_bytes: int) -> None:
        self._accelerator = accelerator
        self.memory = torch.zeros(num_bytes, dtype=torch.uint8, device=accelerator.device)
        self._pool = PinnedPool(accelerator, num_bytes)
        self._flying: list[tuple[torch.Tensor, Event]] = []

    @property
    def num_buffers(self) -> int:
        return self._pool.made

    def begin(self) -> Upload:
        return Upload(self)

    def send(self, arrays: list[np.ndarray], offsets: list[int], total: int) -> torch.Tensor:
        """Queues the copy of arrays to those offsets; the memory they will be in."""
        while self._flying and self._flying[0][1].query():
            self._pool.give(self._flying.pop(0)[0])
        buffer = self._pool.take(total)
        host = buffer.numpy()
        for array, offset in zip(arrays, offsets, strict=True):
            host[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        memory = self.memory
        if total > len(memory):
            memory = torch.empty(total, dtype=torch.uint8, device=self._accelerator.device)
        memory[:total].copy_(buffer[:total], non_blocking=True)
        event = self._accelerator.event()
        event.record(self._accelerator.compute)
        self._flying.append((buffer, event))
        return memory


class Upload:
    """The arrays one step sends: each is added, all are sent at once, and then are tensors by their numbers.

    The tensors are the next upload's as soon as that is sent.
    """

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._arrays: list[np.ndarray] = []
        self._offsets: list[int] = []
        self._total = 0
        self._memory: torch.Tensor | None = None

    def add(self, array: np.ndarray) -> int:
        self._arrays.append(np.ascontiguousarray(array))
        self._offsets.append(self._total)
        self._total += _aligned(array.nbytes)
        return len(self._arrays) - 1

    def add_ids(self, ids: list[int]) -> int:
        return self.add(np.array(ids, dtype=np.int64))

    def send(self, at_home: int = 0) -> None:
        """at_home: how many of the first bytes must be in the staging's own memory."""
        if not self._total:
            return
        self._memory = self._staging.send(self._arrays, self._offsets, self._total)
        if at_home and self._memory is not self._staging.memory:
            self._staging.memory[:at_home].copy_(self._memory[:at_home])

    def __getitem__(self, number: int) -> torch.Tensor:
        if self._memory is None:
            raise RuntimeError("nothing has been sent")
        array, offset = self._arrays[number], self._offsets[number]
        part = self._memory[offset : offset + array.nbytes]
        return part.view(_TYPES[array.dtype.name]).view(array.shape)


_TYPES = {
    "bool": torch.bool,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
}


class Download:
    """Tensors that come back from one step; they are read by whoever waits, in any thread."""

    def __init__(self, accelerator: Accelerator, pool: PinnedPool) -> None:
        self._accelerator = accelerator
        self._pool = pool
        self._tensors: list[torch.Tensor] = []
        self._layout: list[tuple[int, torch.dtype, torch.Size]] = []
        self._total = 0
        self._buffer: torch.Tensor | None = None
        self._event = accelerator.event(timing=True)

    @property
    def event(self) -> Event:
        return self._event

    def add(self, tensor: torch.Tensor) -> int:
        self._layout.append((self._total, tensor.dtype, tensor.shape))
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        self._tensors.append(flat)
        self._total += len(flat)
        return len(self._layout) - 1

    def send(self) -> None:
        """Queues the copy, and the event behind it and everything before."""
        if self._tensors:
            joined = torch.cat(self._tensors) if len(self._tensors) > 1 else self._tensors[0]
            self._buffer = self._pool.take(self._total)
            self._buffer[: self._total].copy_(joined, non_blocking=True)
            self._tensors.clear()
        self._event.record(self._accelerator.compute)

    def wait(self) -> list[np.ndarray]:
        """Sleeps until all is there; the arrays in the order they were added in. Called once."""
        self._event.synchronize()
        if self._buffer is None:
            return []
        host = self._buffer.numpy()[: self._total].copy()
        self._pool.give(self._buffer)
        self._buffer = None
        arrays = []
        for offset, dtype, shape in self._layout:
            name = str(dtype).removeprefix("torch.")
            size = shape.numel() * dtype.itemsize
            arrays.append(host[offset : offset + size].view(name).reshape(tuple(shape)))
        return arrays
