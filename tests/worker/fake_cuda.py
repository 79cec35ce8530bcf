"""A GPU made of CPU tensors, stricter than a real one.

Device tensors are a tensor subclass: to torch they are on ``cuda:0``, and every operation on them comes
here, is run on the CPU tensor inside, and is checked against the rules that a GPU leaves to the programmer:

* Each stream is a queue. An operation that touches memory another stream touched, with nothing that makes
  one wait for the other, is a race. Events and streams carry vector clocks (as ThreadSanitizer's) for that.
* A copy to pinned memory arrives when somebody waits for an event behind it, and not before: until then the
  memory holds garbage. A copy from pinned memory that is changed before it is known to be done is a fault.
* What the host can only know by waiting (``item``, copies to and from pageable memory) is noted in
  ``stalls``, and raises while a graph is captured.
* A captured operation has no effect until a replay, which runs exactly what was recorded on the same
  tensors: values that came from the host are as they were. Results of a graph are garbage after the capture
  and once another graph has been replayed.
* New memory holds garbage. Memory is counted, and runs out.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from aserve.worker.accelerator import Graph

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
GARBAGE = 0x7A

_SYNCHRONOUS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_dim",
    "aten::_unique2",
}
_CONVERSIONS = {"aten::to", "aten::_to_copy", "aten::cpu", "aten::cuda"}
_UNINITIALISED = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}
_IDS_FROM_HOST = {"copy_blocks"}
"""Operations of aserve's whose ids are taken from pageable memory: so few that the driver does not wait."""
_INDEXED = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}


class HazardError(RuntimeError):
    """What would go wrong on a GPU, if not every time."""


class Memory:
    """One allocation on the device, and who touched it last."""

    __slots__ = ("__weakref__", "reads", "written")

    def __init__(self) -> None:
        self.written: tuple[int, int] | None = None
        self.reads: dict[int, int] = {}


class DeviceTensor(torch.Tensor):
    """A tensor of the fake device; ``inner`` holds its data."""

    inner: torch.Tensor
    memory: Memory
    machine: Machine

    @staticmethod
    def __new__(cls, inner: torch.Tensor, memory: Memory, machine: Machine) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CUDA,
        )
        made.inner, made.memory, made.machine = inner, memory, machine
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **options: Any) -> str:
        return f"DeviceTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, DeviceTensor)]
        return found[0].machine.run(func, args, kwargs or {})


class Stream:
    """clock: of each stream, the last operation that comes before the next one of this stream."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.clock: dict[int, int] = {number: 0}


def merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


class Event:
    def __init__(self, machine: Machine, timing: bool) -> None:
        self._machine = machine
        self._timing = timing
        self.clock: dict[int, int] | None = None
        self._at = 0.0

    def record(self, stream: Stream) -> None:
        with self._machine.lock:
            self.clock = dict(stream.clock)
            self._at = time.perf_counter()

    def wait(self, stream: Stream) -> None:
        with self._machine.lock:
            merge(stream.clock, self._recorded())

    def query(self) -> bool:
        with self._machine.lock:
            done = self._machine.is_done(self._recorded())
            if done:
                self._machine.seen(self._recorded())
            return done

    def synchronize(self) -> None:
        with self._machine.lock:
            self._machine.finish(self._recorded())

    def elapsed_time(self, end: Event) -> float:
        if not (self._timing and end._timing):
            raise HazardError("time is asked of events made without timing")
        if not (self._machine.is_done(self._recorded()) and self._machine.is_done(end._recorded())):
            raise HazardError("time is asked of events that have not come")
        return (end._at - self._at) * 1000

    def _recorded(self) -> dict[int, int]:
        if self.clock is None:
            raise HazardError("the event has never been recorded")
        return self.clock


class _Recording:
    """A graph being captured: operations in order, the memory it owns and how much of it is used now, and
    the memory of others that it reads and writes."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[torch.Tensor], list[bool]]] = []
        self.owned: weakref.WeakSet[Memory] = weakref.WeakSet()
        self.used = 0
        self.reads: dict[int, Memory] = {}
        self.writes: dict[int, Memory] = {}


class Machine:
    """The device: its memory, its streams, and what has come to pass.

    stalls: why, each time, a thread had to wait for the device.
    """

    def __init__(self, total: int, outside: int = 0) -> None:
        self.total, self.outside = total, outside
        self.lock = threading.RLock()
        self.streams = [Stream(0), Stream(1)]
        self.stalls: list[str] = []
        self.allocated = self.peak = self.reserved = 0
        self.captures = self.replays = 0
        self._shared = 0
        self.pinned: dict[int, torch.Tensor] = {}
        self._completed: dict[int, int] = {}
        self._arriving: list[tuple[tuple[int, int], torch.Tensor, torch.Tensor]] = []
        self._leaving: list[tuple[tuple[int, int], torch.Tensor, torch.Tensor]] = []
        self._local = threading.local()
        self._recording: _Recording | None = None
        self._results: list[list[torch.Tensor]] = []

    # ---------------------------------------------------------------- time

    @property
    def stream(self) -> Stream:
        stream: Stream | None = getattr(self._local, "stream", None)
        if stream is None:
            raise HazardError("a thread in which the device is not active uses it")
        return stream

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before = getattr(self._local, "stream", None)
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    def is_done(self, clock: dict[int, int]) -> bool:
        return all(self._completed.get(stream, 0) >= count for stream, count in clock.items())

    def seen(self, clock: dict[int, int]) -> None:
        """This thread knows that all this is done: what it queues from now on comes after."""
        known = self._local.__dict__.setdefault("known", {})
        merge(known, clock)

    def finish(self, clock: dict[int, int]) -> None:
        """Somebody has waited for all this."""
        merge(self._completed, clock)
        self.seen(clock)
        self._deliver(lambda stamp, _: self._completed.get(stamp[0], 0) >= stamp[1])
        left = []
        for stamp, source, content in self._leaving:
            if self._completed.get(stamp[0], 0) < stamp[1]:
                left.append((stamp, source, content))
            elif not torch.equal(source, content):
                raise HazardError("pinned memory was changed while it was copied from")
        self._leaving = left

    @torch.inference_mode()
    def _deliver(self, wanted: Callable[[tuple[int, int], torch.Tensor], bool]) -> None:
        waiting = []
        for stamp, target, content in self._arriving:
            if wanted(stamp, target):
                target.copy_(content)
            else:
                waiting.append((stamp, target, content))
        self._arriving = waiting

    def _tick(self, reads: list[Memory], writes: list[Memory]) -> tuple[int, int]:
        """One operation of the current stream; HazardError if another stream may be at the same memory."""
        stream = self.stream
        merge(stream.clock, getattr(self._local, "known", {}))
        stream.clock[stream.number] += 1
        stamp = stream.number, stream.clock[stream.number]
        for memory in (*reads, *writes):
            if memory.written is not None and not self._before(memory.written, stream):
                raise HazardError("memory is used while another stream may be writing it")
        for memory in writes:
            if any(not self._before(each, stream) for each in memory.reads.items()):
                raise HazardError("memory is written while another stream may be reading it")
            memory.written, memory.reads = stamp, {}
        for memory in reads:
            memory.reads[stream.number] = stamp[1]
        return stamp

    @staticmethod
    def _before(stamp: tuple[int, int], stream: Stream) -> bool:
        return stamp[0] == stream.number or stream.clock.get(stamp[0], 0) >= stamp[1]

    def _stall(self, why: str) -> None:
        if self._recording is not None:
            raise HazardError(f"while a graph is captured: {why}")
        self.stalls.append(why)
        self.finish(dict(self.stream.clock))

    # ---------------------------------------------------------------- memory

    def wrap(self, inner: torch.Tensor) -> DeviceTensor:
        """A tensor in new memory."""
        memory = Memory()
        size = -(-inner.numel() * inner.element_size() // 512) * 512
        if self.allocated + size + self.outside > self.total:
            raise torch.OutOfMemoryError("the fake device is full")
        recording = self._recording
        if recording is None:
            self.allocated += size
        else:
            # All graphs share their temporary memory, which stays theirs.
            recording.owned.add(memory)
            recording.used += size
            grown = max(0, recording.used - self._shared)
            self._shared += grown
            self.allocated += grown
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, self.allocated)
        weakref.finalize(memory, self._free, size, recording)
        return DeviceTensor(inner, memory, self)

    def _free(self, size: int, recording: _Recording | None) -> None:
        if recording is None:
            self.allocated -= size
        else:
            recording.used -= size

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def _overlaps(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
            return False
        (first, last), (start, end) = (
            (each.data_ptr(), each.data_ptr() + each.numel() * each.element_size()) for each in (a, b)
        )
        return first < end and start < last

    # ---------------------------------------------------------------- operations

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        here = [each for each in leaves if isinstance(each, DeviceTensor)]
        target = next((each for each in leaves if isinstance(each, torch.device)), None)
        if not here and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        with self.lock:
            return self._run(func, args, kwargs, leaves, here, target)

    def _run(self, func: Any, args: Any, kwargs: Any, leaves: Any, here: Any, target: Any) -> Any:
        name = func._schema.name
        host = [
            each for each in leaves if isinstance(each, torch.Tensor) and not isinstance(each, DeviceTensor)
        ]
        if name == "aten::copy_" and host:
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            copy = self._upload if isinstance(args[0], DeviceTensor) else self._download
            return copy(args[0], args[1], bool(non_blocking))
        if name in _CONVERSIONS and (host or (target is not None and target.type == "cpu")):
            self._stall("a conversion between host and device")
            inner = [each.inner if isinstance(each, DeviceTensor) else each for each in args[:1]]
            moved = self._inner(func, (*inner, *args[1:]), kwargs)
            moved = moved.clone() if moved is inner[0] else moved
            return self.wrap(moved) if host else moved
        if name in _INDEXED:
            if host:
                self._stall("an index on the host")
            index = [each for each in pytree.tree_leaves(args[1]) if isinstance(each, torch.Tensor)]
            if any(each.dtype in (torch.bool, torch.uint8) for each in index):
                self._stall("an index by truth values")
        elif name.rpartition("::")[2] in _IDS_FROM_HOST:
            if self._recording is not None:
                raise HazardError("a captured copy from the host")
        elif any(each.dim() for each in host):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if name in _SYNCHRONOUS:
            self._stall(name)
        return self._compute(func, args, kwargs, here)

    def _inner(self, func: Any, args: Any, kwargs: Any) -> Any:
        def swap(each: Any) -> Any:
            if isinstance(each, DeviceTensor):
                return each.inner
            return CPU if isinstance(each, torch.device) else each

        args, kwargs = pytree.tree_map(swap, (args, kwargs))
        return func(*args, **kwargs)

    def _compute(self, func: Any, args: Any, kwargs: Any, here: list[DeviceTensor]) -> Any:
        written = self._written(func, args, kwargs)
        recording = self._recording
        undo = []
        if recording is not None:
            for each in here:
                if each.memory not in recording.owned:
                    recording.reads[id(each.memory)] = each.memory
            for each in written:
                if each.memory not in recording.owned:
                    recording.writes[id(each.memory)] = each.memory
                    undo.append((each.inner, each.inner.clone()))
        else:
            self._tick([each.memory for each in here], [each.memory for each in written])
        result = self._inner(func, args, kwargs)
        known = {each.inner.untyped_storage().data_ptr(): each for each in here if each.numel()}
        same = {id(each.inner): each for each in here}
        fresh: list[bool] = []
        found: list[torch.Tensor] = []

        def out(each: Any) -> Any:
            if not isinstance(each, torch.Tensor):
                return each
            owner = known.get(each.untyped_storage().data_ptr())
            found.append(each)
            fresh.append(owner is None)
            if id(each) in same:
                return same[id(each)]
            if owner is not None:
                return DeviceTensor(each, owner.memory, self)
            if func._schema.name in _UNINITIALISED:
                spoil(each)
            made = self.wrap(each)
            if recording is None:
                made.memory.written = (self.stream.number, self.stream.clock[self.stream.number])
            return made

        wrapped = pytree.tree_map(out, result)
        if recording is not None:
            inner = pytree.tree_map(
                lambda each: (
                    each.inner
                    if isinstance(each, DeviceTensor)
                    else (CPU if isinstance(each, torch.device) else each)
                ),
                (args, kwargs),
            )
            recording.operations.append((func, *inner, found, fresh))
            for tensor, before in undo:
                tensor.copy_(before)
        return wrapped

    @staticmethod
    def _written(func: Any, args: Any, kwargs: Any) -> list[DeviceTensor]:
        written = []
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = kwargs.get(argument.name, args[at] if at < len(args) else None)
                written += [each for each in pytree.tree_leaves(value) if isinstance(each, DeviceTensor)]
        return written

    def _upload(self, target: DeviceTensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        if not (non_blocking and self.is_pinned(source)):
            self._stall("a copy from the host that waits")
            self._tick([], [target.memory])
            target.inner.copy_(source)
            return target
        if self._recording is not None:
            raise HazardError("a captured copy from the host")
        stamp = self._tick([], [target.memory])
        for arriving, there, _ in self._arriving:
            if self._overlaps(there, source) and not self._before(arriving, self.stream):
                raise HazardError("pinned memory is read while a copy to it may be on its way")
        self._deliver(lambda _, there: self._overlaps(there, source))
        self._leaving.append((stamp, source, source.clone()))
        target.inner.copy_(source)
        return target

    def _download(self, target: torch.Tensor, source: DeviceTensor, non_blocking: bool) -> torch.Tensor:
        if not (non_blocking and self.is_pinned(target)):
            self._stall("a copy to the host that waits")
            self._tick([source.memory], [])
            return target.copy_(source.inner)
        if self._recording is not None:
            raise HazardError("a captured copy to the host")
        stamp = self._tick([source.memory], [])
        for arriving, there, _ in self._arriving:
            if self._overlaps(there, target) and not self._before(arriving, self.stream):
                raise HazardError("two copies to the same pinned memory may be on their way")
        self._deliver(lambda _, there: self._overlaps(there, target))
        content = source.inner.clone().to(target.dtype)
        spoil(target)
        self._arriving.append((stamp, target, content))
        return target

    # ---------------------------------------------------------------- graphs

    def capture(self, function: Callable[[], Any]) -> Graph[Any]:
        if self._recording is not None:
            raise HazardError("a capture within a capture")
        self._recording = recording = _Recording()
        try:
            result = function()
        finally:
            self._recording = None
        self.captures += 1
        for _, _, _, found, fresh in recording.operations:
            for tensor, is_fresh in zip(found, fresh, strict=True):
                if is_fresh:
                    spoil(tensor)
        leaves = _tensors_of(result)
        results = [each.inner for each in leaves]
        self._results.append(results)
        reads = list(recording.reads.values())
        writes = [*recording.writes.values(), *(each.memory for each in leaves)]

        def replay() -> None:
            with self.lock:
                self.replays += 1
                self._tick(reads, list({id(each): each for each in writes}.values()))
                for func, args, kwargs, found, fresh in recording.operations:
                    again = [
                        each
                        for each in pytree.tree_leaves(func(*args, **kwargs))
                        if isinstance(each, torch.Tensor)
                    ]
                    for tensor, new, is_fresh in zip(found, again, fresh, strict=True):
                        if is_fresh:
                            tensor.copy_(new)
                for others in self._results:
                    if others is not results:
                        for tensor in others:
                            spoil(tensor)

        return Graph(replay, result)


def _tensors_of(result: Any) -> list[DeviceTensor]:
    """Those of a graph's result, which may be a dataclass with slots."""
    if hasattr(result, "__dataclass_fields__"):
        result = [getattr(result, name) for name in result.__dataclass_fields__]
    return [each for each in pytree.tree_leaves(result) if isinstance(each, DeviceTensor)]


def spoil(tensor: torch.Tensor) -> None:
    """Fills it with garbage: not-a-number, or a number far from any index."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype is torch.bool:
        tensor.fill_(True)
    else:
        tensor.view(-1).view(torch.uint8).fill_(GARBAGE) if tensor.is_contiguous() else tensor.fill_(GARBAGE)


class _Mode(TorchDispatchMode):
    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._machine.run(func, args, kwargs or {})


class FakeAccelerator:
    """:class:`aserve.worker.accelerator.CudaAccelerator` on a fake machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.device = CUDA
        self.compute: Any
        self.side: Any
        self.compute, self.side = machine.streams

    @contextmanager
    def active(self) -> Iterator[None]:
        before = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
        # Or torch.tensor(..., device="cuda") would copy where nothing here sees it. Of each thread.
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        try:
            with self.machine.on(self.compute), _Mode(self.machine):
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(before)  # type: ignore[attr-defined]

    def on(self, stream: Any) -> Any:
        return self.machine.on(stream)

    def event(self, *, timing: bool = False) -> Any:
        return Event(self.machine, timing)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        tensor = torch.empty(num_bytes, dtype=torch.uint8)
        spoil(tensor)
        # Never given back: an address must not come to mean other memory.
        self.machine.pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def synchronize(self) -> None:
        with self.machine.lock:
            for stream in self.machine.streams:
                self.machine.finish(dict(stream.clock))

    def capture(self, function: Callable[[], Any]) -> Graph[Any]:
        return self.machine.capture(function)

    def memory(self) -> tuple[int, int]:
        machine = self.machine
        return machine.total - machine.outside - machine.reserved, machine.total

    def reset_peak(self) -> None:
        self.machine.peak = self.machine.allocated

    def peak(self) -> int:
        return self.machine.peak

    def taken(self) -> int:
        return self.machine.allocated

    def reserved(self) -> int:
        return self.machine.reserved

    def release(self) -> None:
        self.machine.reserved = self.machine.allocated


@contextmanager
def installed(machine: Machine) -> Iterator[Machine]:
    """Within it ``cuda`` is this machine, for torch and for aserve."""
    import aserve.worker.cuda
    from aserve.attention import route

    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "_lazy_init", lambda: None),
        (aserve.worker.cuda, "CudaAccelerator", lambda: FakeAccelerator(machine)),
    ]
    # What serves a layer is remembered, and is another thing on another device.
    remembered = (route.choose, route._own)
    for each in remembered:
        each.cache_clear()
    before = [getattr(owner, name) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        with _guard():
            yield machine
    finally:
        for (owner, name, _), value in zip(patches, before, strict=True):
            setattr(owner, name, value)
        for each in remembered:
            each.cache_clear()


@contextmanager
def _guard() -> Iterator[None]:
    """Gives torch a device guard for CUDA where it was built without: that of the meta device, which does
    nothing. Without one it refuses to index a tensor of that device."""
    cuda, meta = 1, 14  # c10::DeviceType
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so"))
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[cuda]
    guards[cuda] = guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


def methods(kind: type) -> dict[str, list[tuple[str, Any, Any]]]:
    """Public methods and what they take: names, kinds, defaults."""
    return {
        name: [(each.name, each.kind, each.default) for each in inspect.signature(value).parameters.values()]
        for name, value in vars(kind).items()
        if not name.startswith("_") and callable(value)
    }
