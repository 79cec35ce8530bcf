"""The fake GPU notices what it is there to notice, and the runner's mistakes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aserve import LLM, SamplingParams
from aserve.errors import AserveError
from aserve.worker.accelerator import CudaAccelerator
from aserve.worker.device_batch import DeviceBatch
from tests import tiny_checkpoint
from tests.worker import fake_cuda
from tests.worker.fake_cuda import CUDA, FakeAccelerator, HazardError, Machine

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the fake stands in for a GPU that is not there"),
]


@pytest.fixture
def device() -> Iterator[FakeAccelerator]:
    machine = Machine(1 << 30)
    with fake_cuda.installed(machine):
        accelerator = FakeAccelerator(machine)
        with accelerator.active(), torch.inference_mode():
            yield accelerator


def test_it_has_the_methods_of_the_real_one() -> None:
    assert fake_cuda.methods(FakeAccelerator) == fake_cuda.methods(CudaAccelerator)


def test_a_tensor_is_on_cuda_and_computes(device: FakeAccelerator) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=CUDA)
    assert x.device == CUDA and x.is_cuda and not x.is_cpu
    assert (x @ x)[1].tolist() == [15.0, 22.0]
    assert x.view(-1)[1:3].add_(1).tolist() == [3.0, 4.0] and x.sum().item() == 12.0
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(2, 2)


def test_new_memory_holds_garbage_and_runs_out(device: FakeAccelerator) -> None:
    assert torch.empty(4, device=CUDA).isnan().all()
    before = device.taken()
    x = torch.zeros(1 << 20, device=CUDA)
    assert device.taken() - before == 4 << 20
    device.reset_peak()
    y = x + 1
    assert device.peak() - before == 8 << 20
    del x, y
    assert device.taken() == before
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1 << 29, device=CUDA)


def test_a_copy_to_the_host_arrives_when_it_is_waited_for(device: FakeAccelerator) -> None:
    x = torch.arange(4, dtype=torch.int32, device=CUDA)
    host = device.pinned(16).view(torch.int32)
    host.copy_(x, non_blocking=True)
    event = device.event()
    event.record(device.compute)
    x.zero_()
    assert host.tolist() != [0, 1, 2, 3] and not event.query()
    event.synchronize()
    assert host.tolist() == [0, 1, 2, 3] and event.query()
    assert device.machine.stalls == []
    x.tolist()
    assert device.machine.stalls == ["a conversion between host and device"]


def test_pinned_memory_changed_too_early_is_seen(device: FakeAccelerator) -> None:
    x, host = torch.empty(16, dtype=torch.uint8, device=CUDA), device.pinned(16)
    x.copy_(host, non_blocking=True)
    host.fill_(1)
    with pytest.raises(HazardError, match="changed while it was copied"):
        device.synchronize()


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("writes", ["side", "compute"])
def test_streams_race_unless_one_waits(device: FakeAccelerator, waits: bool, writes: str) -> None:
    x, host = torch.zeros(16, dtype=torch.uint8, device=CUDA), device.pinned(16)
    made = device.event()
    made.record(device.compute)
    made.wait(device.side)
    event = device.event()

    def copy() -> None:
        with device.on(device.side):
            x.copy_(host, non_blocking=True) if writes == "side" else host.copy_(x, non_blocking=True)

    copy()
    event.record(device.side)
    if waits:
        event.wait(device.compute)
        x.add_(1)
    else:
        with pytest.raises(HazardError, match="another stream"):
            x.add_(1)


def test_a_graph_repeats_what_was_recorded_on_the_same_memory(device: FakeAccelerator) -> None:
    x = torch.ones(3, device=CUDA)
    total = torch.zeros(3, device=CUDA)
    factor = [2.0]

    def step() -> torch.Tensor:
        y = x * factor[0]
        total.add_(y)
        return y.view(3, 1)

    graph = device.capture(step)
    other = device.capture(lambda: x + 1)
    assert total.tolist() == [0.0] * 3 and graph.result.isnan().all()
    factor[0] = 100.0  # too late: a number of the host's is part of the graph
    x.fill_(5)
    graph.replay()
    assert graph.result.flatten().tolist() == [10.0] * 3 and total.tolist() == [10.0] * 3
    other.replay()
    assert graph.result.isnan().all() and other.result.tolist() == [6.0] * 3


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: bool(x > 0),
        lambda x: torch.nonzero(x),
        lambda x: x.view(1)[torch.tensor([0])],
        lambda x: torch.tensor([1.0], device=CUDA) + x,
        lambda x: x.cpu(),
    ],
)
def test_a_capture_refuses_what_the_host_would_have_to_know(
    device: FakeAccelerator, reads: Callable[[torch.Tensor], Any]
) -> None:
    x = torch.ones((), device=CUDA)
    reads(x)
    with pytest.raises(HazardError, match="captured"):
        device.capture(lambda: reads(x))


# ---------------------------------------------------------------- mistakes of the runner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"), weights=True)


def generate(checkpoint: Path, device: str) -> list[list[int]]:
    """Three sequences, in a batch of four, of which two are swapped out on the way."""
    prompts = [[7 + (31 * seed + place * place) % 200 for place in range(20 + seed)] for seed in range(3)]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    options = {"num_gpu_blocks_override": 8, "preemption_mode": "swap", "max_num_seqs": 3}
    with LLM(str(checkpoint), dtype="float32", device=device, max_model_len=64, **options) as llm:
        outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
        assert llm.llm_engine.core.num_preemptions > 0
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def right(checkpoint: Path) -> list[list[int]]:
    return generate(checkpoint, "cpu")


def no_wait_for_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_cuda.Event, "synchronize", lambda self: None)
    monkeypatch.setattr(fake_cuda.Event, "elapsed_time", lambda self, end: 0.0)


def no_wait_between_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_cuda.Event, "wait", lambda self, stream: None)


def buffers_used_again_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_cuda.Event, "query", lambda self: True)


def positions_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = DeviceBatch.decode_inputs

    def stale(self: DeviceBatch, slots: Any, positions: Any, *rest: Any, **options: Any) -> Any:
        if options.get("graph"):
            positions = torch.full_like(positions, 21)
        return inputs(self, slots, positions, *rest, **options)

    monkeypatch.setattr(DeviceBatch, "decode_inputs", stale)


def a_length_read_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = DeviceBatch.decode_inputs

    def reads(self: DeviceBatch, slots: Any, positions: Any, *rest: Any, **options: Any) -> Any:
        positions.max().item()
        return inputs(self, slots, positions, *rest, **options)

    monkeypatch.setattr(DeviceBatch, "decode_inputs", reads)


def idle_rows_in_a_block_of_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceBatch, "set_scratch", lambda self, block: None)


MISTAKES = [
    no_wait_for_results,
    no_wait_between_streams,
    buffers_used_again_too_early,
    positions_of_the_host,
    a_length_read_on_the_host,
    idle_rows_in_a_block_of_somebody,
]


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_the_runner_is_right_and_its_mistakes_are_seen(
    checkpoint: Path, right: list[list[int]], mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_cuda.installed(Machine(1 << 30)):
        if mistake is None:
            assert generate(checkpoint, "cuda") == right
            return
        mistake(monkeypatch)
        try:
            found = generate(checkpoint, "cuda")
        except (HazardError, AserveError, IndexError):
            return
        assert found != right
