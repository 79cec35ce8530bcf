"""Where the checks run: a GPU, or the emulated kernels on a CPU."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from aserve.errors import UnsupportedError
from aserve.ops import probe

Call = Callable[[], Any]
_cuda: Any = torch.cuda


class Machine(Protocol):
    """ops: the operations, by name. l2: bytes that inputs have to exceed to come from memory."""

    dry: bool
    device: str
    ops: Any
    l2: int

    def describe(self) -> dict[str, Any]:
        """What every result is obtained on: device, capability, date, sources."""
        ...

    def properties(self) -> dict[str, Any]:
        """The device's size."""
        ...

    def wait(self) -> None:
        """Until everything launched has ended. RuntimeError: a launch failed."""
        ...

    def capture(self, call: Call) -> Call:
        """A function that repeats what the call does, on the tensors it used, as they then are."""
        ...

    def seconds(self, call: Call) -> float:
        """How long the device takes for the call, whose launch nothing on the host may delay."""
        ...


class Gpu:
    """The current CUDA device. UnsupportedError: there is none, or no library for it."""

    dry = False
    device = "cuda"

    def __init__(self) -> None:
        if not _cuda.is_available():
            raise UnsupportedError("gpu-check needs a CUDA device, and torch finds none here; use --dry-run")
        self._entry = probe.cuda_library()
        self.ops = probe.operations()
        self.l2 = int(_cuda.get_device_properties(0).L2_cache_size)
        self._flood = torch.empty(8 * self.l2, dtype=torch.uint8, device=self.device)

    def describe(self) -> dict[str, Any]:
        return {
            "device": str(_cuda.get_device_name()),
            "capability": list(_cuda.get_device_capability()),
            "date": datetime.date.today().isoformat(),
            "sources": self._entry["sources"],
        }

    def properties(self) -> dict[str, Any]:
        found = _cuda.get_device_properties(0)
        return {
            "memory_bytes": int(found.total_memory),
            "multiprocessors": int(found.multi_processor_count),
            "l2_bytes": int(found.L2_cache_size),
        }

    def wait(self) -> None:
        _cuda.synchronize()

    def capture(self, call: Call) -> Call:
        stream = _cuda.Stream()
        stream.wait_stream(_cuda.current_stream())
        with _cuda.stream(stream):
            call()  # whatever is set up at first use must not be captured
        _cuda.current_stream().wait_stream(stream)
        graph = _cuda.CUDAGraph()
        with _cuda.graph(graph):
            call()
        replay: Call = graph.replay
        return replay

    def seconds(self, call: Call) -> float:
        # The device is kept busy while the host queues the call, and its caches lose what they held.
        self._flood.zero_()
        first, last = _cuda.Event(enable_timing=True), _cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3


class Emulation:
    """The kernels of the same sources, run on the CPU. Says nothing of speed."""

    dry = True
    device = "cpu"
    l2 = 1 << 12

    def __init__(self) -> None:
        from aserve.gpu_check import emulation

        self.ops = emulation.operations()
        self._sources = emulation.sources_digest()
        torch.set_num_threads(1)

    def describe(self) -> dict[str, Any]:
        return {
            "device": "emulation",
            "capability": [0, 0],
            "date": datetime.date.today().isoformat(),
            "sources": self._sources,
        }

    def properties(self) -> dict[str, Any]:
        return {}

    def wait(self) -> None:
        pass

    def capture(self, call: Call) -> Call:
        from aserve.gpu_check.recording import record

        call()
        return record(call)

    def seconds(self, call: Call) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started


def open_machine(dry: bool) -> Machine:
    return Emulation() if dry else Gpu()
