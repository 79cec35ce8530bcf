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

    def wait(self) -> None:
        """Until everything launched has ended. RuntimeError: a launch failed."""
        ...

    def capture(self, call: Call) -> Call:
        """A function that repeats what the call does, on the tensors it used, as they then are."""
        ...

    def seconds(self, call: Call) -> float:
        """How long the device takes for the call."""
        ...


class Gpu:
    """The current CUDA device. UnsupportedError: there is none, or no library for it."""

    dry = False
    device = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise UnsupportedError("gpu-check needs a CUDA device, and torch finds none here; use --dry-run")
        self._entry = probe.cuda_library()
        self.ops = probe.operations()
        self.l2 = int(torch.cuda.get_device_properties(0).L2_cache_size)

    def describe(self) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "date": datetime.date.today().isoformat(),
            "sources": self._entry["sources"],
        }

    def wait(self) -> None:
        torch.cuda.synchronize()

    def capture(self, call: Call) -> Call:
        stream = _cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # whatever is set up at first use must not be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        replay: Call = graph.replay
        return replay

    def seconds(self, call: Call) -> float:
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
