"""What is asked of ``torch.cuda``, in the order that CUDA wants it; on a stand-in for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aserve.errors import UnsupportedError
from aserve.gpu_check import machine
from aserve.gpu_check.children import _NoDevice
from aserve.gpu_check.machine import Gpu
from aserve.gpu_check.phases import environment
from aserve.gpu_check.timing import microseconds
from aserve.ops import cuda, probe


class Stream:
    def __init__(self, log: list[Any]) -> None:
        self._log = log

    def wait_stream(self, other: Any) -> None:
        self._log.append("wait")


class Event:
    clock = 0.0

    def __init__(self, log: list[Any]) -> None:
        self._log = log

    def record(self) -> None:
        self.at = Event.clock
        self._log.append("record")

    def synchronize(self) -> None:
        self._log.append("event")

    def elapsed_time(self, other: Any) -> float:
        assert self._log[-1] == "event", "the time is known once the last event has come"
        return float(other.at - self.at)


class Cuda:
    """Notes what it is asked. A captured call runs at its replays only."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.capturing = False

    def is_available(self) -> bool:
        return True

    def get_device_name(self) -> str:
        return "NVIDIA H100"

    def get_device_capability(self) -> tuple[int, int]:
        return (9, 0)

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(L2_cache_size=64, total_memory=1 << 30, multi_processor_count=132)

    def synchronize(self) -> None:
        assert not self.capturing
        self.log.append("synchronize")

    def Stream(self) -> Stream:
        return Stream(self.log)

    def current_stream(self) -> Stream:
        return Stream(self.log)

    def Event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self.log)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.log.append("side")
        yield
        self.log.append("back")

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.log.append("capture")
        self.capturing = True
        yield
        self.capturing = False
        self.log.append("captured")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    monkeypatch.setattr(machine, "_cuda", made)
    monkeypatch.setattr(Gpu, "device", "cpu")
    monkeypatch.setattr(probe, "cuda_library", lambda: {"sources": "abc"})
    monkeypatch.setattr(probe, "operations", lambda: "operations")
    return made


def test_a_gpu_describes_itself(fake: Cuda) -> None:
    gpu = Gpu()
    about = gpu.describe()
    assert about.pop("date").count("-") == 2
    assert about == {"device": "NVIDIA H100", "capability": [9, 0], "sources": "abc"}
    assert (gpu.ops, gpu.l2) == ("operations", 64)


def test_a_capture(fake: Cuda) -> None:
    replay = Gpu().capture(lambda: fake.log.append("call"))
    assert fake.log == ["wait", "side", "call", "back", "wait", "capture", "call", "captured"]
    replay()
    assert fake.log[-1] == "replay"


def test_a_timing(fake: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of seven replays of 20 calls, which take turns; the device has work before each."""
    gpu = Gpu()
    taken = iter([9.0, 4.0, 5.0, 3.0, 100.0, 6.0, 5.0])
    calls: list[str] = []

    class Timed(Event):
        def record(self) -> None:
            super().record()
            assert (gpu._flood == 0).all()
            Event.clock += next(taken) if fake.log.count("record") % 2 else 0.0

    monkeypatch.setattr(fake, "Event", lambda enable_timing: Timed(fake.log))
    gpu._flood.fill_(7)
    assert microseconds(gpu, [lambda: calls.append("a"), lambda: calls.append("b")]) == pytest.approx(250.0)
    assert calls[:4] == ["a", "b", "a", "b"]
    assert len(calls) == 40, "20 before the capture and 20 in it"
    assert fake.log.count("replay") == 8
    assert fake.log[-4:] == ["record", "replay", "record", "event"]


def test_the_environment_of_a_gpu(fake: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    tool = tmp_path / "nvidia-smi"
    answer = "NVIDIA H100, 580.1, 345 MHz, 2619 MHz, 1980 MHz, 700.00 W, 33"
    tool.write_text(f'#!/bin/sh\n[ "$2" = --format=csv,noheader ] && echo "{answer}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    first, second = environment.units(SimpleNamespace(dry=False))  # type: ignore[arg-type]
    (row,) = first.run(Gpu())
    assert row["nvidia_smi"]["driver_version"] == "580.1"
    assert row["nvidia_smi"]["temperature.gpu"] == "33"
    assert (row["multiprocessors"], row["memory_bytes"], row["torch"]) == (132, 1 << 30, torch.__version__)

    kernels = {("rms_norm", "CUDA"): False}
    monkeypatch.setattr(probe, "has_kernel", lambda name, key: kernels.get((name, key), True))
    monkeypatch.setattr(probe, "schemas_of", lambda namespace: {})
    (row,) = second.run(Gpu())
    assert (row["passed"], row["missing"], row["other_schema"]) == (False, ["rms_norm"], [])
    kernels[("rms_norm", "CUDA")] = True
    (row,) = second.run(Gpu())
    assert row["passed"]


def test_libraries_that_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "operations", lambda: None)
    monkeypatch.setattr(cuda, "_loaded", lambda: None)
    with pytest.raises(UnsupportedError, match=r"no usable libaserve_cuda.so; build it with"):
        probe.cuda_library()
    monkeypatch.setattr(cuda, "_loaded", lambda: {"architectures": ["80"], "sources": "abc"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(UnsupportedError, match=r"built for 80; set ASERVE_CUDA_ARCH=90"):
        probe.cuda_library()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert probe.cuda_library()["sources"] == "abc"


def test_no_device_times_nothing() -> None:
    with pytest.raises(RuntimeError, match="no device"):
        _NoDevice().seconds(lambda: None)
