"""The runner on a fake GPU with the CUDA kernels, emulated, in place of torch: the same tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aserve import LLM, SamplingParams
from aserve.ops import cuda, hardware, native, reference
from aserve.worker.staging import Staging
from aserve.worker.swap import BlockMover
from tests import tiny_checkpoint
from tests.cuda.conftest import bound, library
from tests.worker import fake_cuda

__all__ = ["bound", "library"]

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the fake stands in for a GPU that is not there"),
    pytest.mark.skipif(native.level() == "reference", reason="it is about the native kernels"),
]


class Recorded:
    """Operations for the device, and how often each was called; ``common`` has those for the CPU."""

    def __init__(self, operations: Any, common: Any) -> None:
        self._operations, self._common = operations, common
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        common = getattr(self._common, name)
        if name not in hardware.BOUND:
            return common
        operation = getattr(self._operations, name)

        def call(*args: Any) -> None:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            if not first.is_cuda:
                common(*args)
                return
            self.calls[name] += 1
            operation(*args)

        return call


@pytest.fixture
def kernels(bound: Any, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The CUDA kernels in emulation, for all that they serve."""
    found = Recorded(bound, native.library())
    monkeypatch.setattr(native, "_library", found)
    monkeypatch.setattr(cuda, "serves", lambda *combination: True)
    return found


@pytest.fixture
def machine() -> Iterator[fake_cuda.Machine]:
    with fake_cuda.installed(fake_cuda.Machine(1 << 30, 1 << 20)) as machine:
        yield machine


@pytest.mark.parametrize("alike", [True, False])
def test_blocks_are_copied_by_one_kernel_where_all_layers_are_alike(
    kernels: Recorded, machine: fake_cuda.Machine, alike: bool
) -> None:
    accelerator = fake_cuda.FakeAccelerator(machine)
    pairs = [(0, 3), (1, 4), (3, 5), (2, 3), (6, 1)]
    heads = (2, 2) if alike else (2, 1)
    with accelerator.active(), torch.inference_mode():
        host = [tuple(torch.randn(7, count, 8, 8) for _ in range(2)) for count in heads]
        caches = [(k.to(accelerator.device), v.to(accelerator.device)) for k, v in host]
        machine.stalls.clear()
        mover, upload = BlockMover(accelerator, caches, 0), Staging(accelerator, 1 << 12).begin()
        sections = mover.pack(pairs, upload)
        upload.send()
        mover.copy(pairs, upload, sections)
        assert machine.stalls == []
        reference.copy_blocks(host, pairs)
        for cache, wanted in zip(caches, host, strict=True):
            for side, want in zip(cache, wanted, strict=True):
                assert torch.equal(side.cpu(), want)
    assert kernels.calls["copy_blocks"] == int(alike)


def test_a_captured_copy_of_blocks_is_refused(kernels: Recorded, machine: fake_cuda.Machine) -> None:
    accelerator = fake_cuda.FakeAccelerator(machine)
    with accelerator.active(), torch.inference_mode():
        cache = torch.zeros(2, 1, 8, 8, device=accelerator.device)
        mover, upload = BlockMover(accelerator, [(cache, cache)], 0), Staging(accelerator, 64).begin()
        with pytest.raises(fake_cuda.HazardError, match="captured copy"):
            accelerator.capture(lambda: mover.copy([(0, 1)], upload, []))


def prompt(seed: int, length: int) -> list[int]:
    return [5 + (seed * 31 + place * place * 7 + place * 3) % 240 for place in range(length)]


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Greedy ones, and drawn ones that a kernel draws in a pass, that need more, and that share blocks."""
    greedy = {"temperature": 0.0, "max_tokens": 10, "ignore_eos": True}
    drawn = {"temperature": 0.9, "seed": 11, "max_tokens": 10, "ignore_eos": True}
    return [
        (prompt(1, 3), SamplingParams(**greedy)),
        (prompt(2, 17), SamplingParams(**greedy, logprobs=2)),
        (prompt(3, 9), SamplingParams(**greedy, min_tokens=4, repetition_penalty=1.3)),
        (prompt(4, 21), SamplingParams(**drawn)),
        (prompt(5, 21), SamplingParams(**drawn, n=3)),
        (prompt(6, 12), SamplingParams(**drawn, presence_penalty=0.5)),
        (prompt(7, 12), SamplingParams(**drawn, top_p=0.8, top_k=30)),
        (prompt(8, 5), SamplingParams(**drawn, logits_processors=[lambda output, row: row])),
    ]


def answers(checkpoint: Path, asked: list[tuple[list[int], SamplingParams]], **options: Any) -> list[Any]:
    with LLM(str(checkpoint), dtype="float32", block_size=8, max_num_seqs=12, **options) as llm:
        outputs = llm.generate(
            prompt_token_ids=[ids for ids, _ in asked],
            sampling_params=[params for _, params in asked],
            use_tqdm=False,
        )
    return [[each.token_ids for each in output.outputs] for output in outputs]


def test_the_tokens_stay_what_they_are(kernels: Recorded, machine: fake_cuda.Machine, tmp_path: Path) -> None:
    checkpoint, asked = tiny_checkpoint.write(tmp_path, weights=True), requests()
    expected = answers(checkpoint, asked[:3], device="cpu")
    found = answers(checkpoint, asked, device="cuda")
    assert found[:3] == expected
    assert {"sample", "copy_blocks", "paged_attention", "greedy_logprob"} <= set(kernels.calls)
    # Whoever else is in the batch, whatever is captured: a drawn token depends on its own request alone.
    alone = [answers(checkpoint, [each], device="cuda", enforce_eager=True)[0] for each in asked[3:]]
    assert found[3:] == alone
