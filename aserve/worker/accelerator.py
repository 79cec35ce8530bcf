"""The device as the runner sees it: everything it asks of ``torch.cuda`` goes through here.

Tests run the whole engine on a fake with the same methods, so what is not in this file has been executed
before it meets a GPU. Keep it small.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

Result = TypeVar("Result")
Stream = Any
"""A queue of work on the device; only ever handed back to the accelerator and its events."""


class Event(Protocol):
    """A mark in a stream. ``synchronize`` may be called by any thread, and sleeps."""

    def record(self, stream: Stream) -> None: ...

    def wait(self, stream: Stream) -> None:
        """Has the stream wait for the mark; the calling thread does not."""

    def query(self) -> bool:
        """Whether everything before the mark is done."""

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this mark to ``end``; both done, both made with ``timing``."""


@dataclass(slots=True)
class Graph(Generic[Result]):
    """A captured function: ``replay`` queues its work again, on the same memory. ``result`` is what it
    returned; its tensors hold a replay's results until any graph is replayed next."""

    replay: Callable[[], None]
    result: Result


class Accelerator(Protocol):
    """What the runner needs of a device.

    device: of tensors. compute, side: its two streams; work goes to ``compute`` unless said otherwise.
    """

    device: torch.device
    compute: Stream
    side: Stream

    def active(self) -> AbstractContextManager[None]:
        """Makes the device and ``compute`` the calling thread's; every thread that queues work needs it."""

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """Queues what is done inside on that stream."""

    def event(self, *, timing: bool = False) -> Event: ...

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Host memory that the device reads and writes by itself, uint8, contents arbitrary."""

    def synchronize(self) -> None:
        """Returns once all streams are done."""

    def capture(self, function: Callable[[], Result]) -> Graph[Result]:
        """Records what the function queues, without doing it. All graphs share their temporary memory, so
        the largest is best captured first."""

    def memory(self) -> tuple[int, int]:
        """Bytes free on the device and its size."""

    def reset_peak(self) -> None: ...

    def peak(self) -> int:
        """Most bytes that tensors took at once since the last reset."""

    def taken(self) -> int:
        """Bytes that tensors take now."""

    def reserved(self) -> int:
        """Bytes that torch keeps for tensors, those between two of them included."""

    def release(self) -> None:
        """Gives back what torch keeps and no tensor takes."""


class CudaAccelerator:
    """An NVIDIA GPU, the calling thread's current one."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.compute: Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.side: Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    @contextmanager
    def active(self) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self.compute):
            yield

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.cuda.stream(stream)
        return context

    def event(self, *, timing: bool = False) -> Event:
        # Blocking: a thread that waits must not spin, or it takes the interpreter's time from the others.
        event: Event = torch.cuda.Event(enable_timing=timing, blocking=True)  # type: ignore[no-untyped-call]
        return event

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def capture(self, function: Callable[[], Result]) -> Graph[Result]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self.compute, capture_error_mode="thread_local"):
            result = function()
        return Graph(graph.replay, result)

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.device)
        return free, total

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def taken(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
