"""What is asked of ``torch.cuda`` exists, with those arguments, though nothing is there to run it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from aserve.worker.accelerator import CudaAccelerator

CALLS = (
    "current_device",
    "device",
    "empty_cache",
    "graph",
    "graph_pool_handle",
    "max_memory_allocated",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "reset_peak_memory_stats",
    "stream",
    "synchronize",
)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch.cuda with functions that check their arguments and do nothing."""
    stubs = {name: mock.create_autospec(getattr(torch.cuda, name)) for name in CALLS}
    stubs["current_device"].return_value = 0
    stubs["mem_get_info"].return_value = (60, 80)
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    # Classes of C++ without a signature to check.
    for name in ("Stream", "Event", "CUDAGraph"):
        assert hasattr(torch.cuda, name)
        stubs[name] = mock.MagicMock(name=name)
        monkeypatch.setattr(torch.cuda, name, stubs[name])
    return stubs


def test_every_call_is_one_that_torch_has(cuda: dict[str, Any]) -> None:
    accelerator = CudaAccelerator()
    assert accelerator.device == torch.device("cuda", 0)
    with accelerator.active(), accelerator.on(accelerator.side):
        assert cuda["stream"].call_args_list == [mock.call(accelerator.compute), mock.call(accelerator.side)]
    accelerator.event(timing=True)
    cuda["Event"].assert_called_once_with(enable_timing=True, blocking=True)
    accelerator.synchronize()
    assert accelerator.memory() == (60, 80)
    accelerator.reset_peak()
    for value in (accelerator.peak, accelerator.taken, accelerator.reserved):
        value()
    accelerator.release()
    assert {name for name in CALLS if cuda[name].called} == set(CALLS) - {"graph", "graph_pool_handle"}


def test_graphs_share_one_pool_and_allow_other_threads_their_calls(cuda: dict[str, Any]) -> None:
    accelerator = CudaAccelerator()
    graphs = [accelerator.capture(lambda: 7) for _ in range(2)]
    assert [graph.result for graph in graphs] == [7, 7]
    cuda["graph_pool_handle"].assert_called_once_with()
    for call in cuda["graph"].call_args_list:
        assert call.kwargs["pool"] is cuda["graph_pool_handle"].return_value
        assert call.kwargs["stream"] is accelerator.compute
        assert call.kwargs["capture_error_mode"] == "thread_local"
    graphs[0].replay()
    cuda["CUDAGraph"].return_value.replay.assert_called_once_with()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_real_device() -> None:
    accelerator = CudaAccelerator()
    with accelerator.active():
        x = torch.ones(4, device=accelerator.device)
        graph = accelerator.capture(lambda: x * 2)
        x.fill_(3)
        graph.replay()
        host = accelerator.pinned(16).view(torch.float32)
        host.copy_(graph.result, non_blocking=True)
        event = accelerator.event(timing=True)
        event.record(accelerator.compute)
        event.synchronize()
        assert event.query() and host.tolist() == [6.0] * 4
        free, total = accelerator.memory()
        assert 0 < free < total and accelerator.taken() <= accelerator.peak() <= accelerator.reserved()
