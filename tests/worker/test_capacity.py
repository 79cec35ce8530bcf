"""How many KV blocks a device has room for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aserve import LLM, EngineArgs, SamplingParams
from aserve.config.engine import EngineConfig
from aserve.errors import ConfigError
from aserve.worker import graphs, swap
from aserve.worker.capacity import MemoryProfile, count_device_blocks, profile
from tests import tiny_checkpoint
from tests.worker import fake_cuda
from tests.worker.fake_cuda import CUDA, FakeAccelerator, Machine

MIB = 1 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"), weights=True)


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> EngineConfig:
    args = EngineArgs(str(checkpoint), device="cpu", max_num_seqs=4, gpu_memory_utilization=0.5)
    return args.create_engine_config()


def with_cache(config: EngineConfig, **changes: Any) -> EngineConfig:
    return replace(config, cache=replace(config.cache, **changes))


def test_what_the_largest_step_leaves_of_the_share(config: EngineConfig) -> None:
    memory = MemoryProfile(total=1000 * MIB, peak=200 * MIB, outside=90 * MIB, graphs=9 * MIB)
    assert memory.left(0.5) == 201 * MIB
    # Blocks that no request can need are worth something to the prefix cache alone.
    assert count_device_blocks(config, 2 * MIB, MIB, memory) == 4 * 9
    caching = with_cache(config, enable_prefix_caching=True)
    assert count_device_blocks(caching, 2 * MIB, MIB, memory) == 100


def test_an_override_counts_as_long_as_it_fits(config: EngineConfig) -> None:
    memory = MemoryProfile(total=1000 * MIB, peak=200 * MIB, outside=100 * MIB)
    assert count_device_blocks(with_cache(config, num_gpu_blocks_override=340), 2 * MIB, 0, memory) == 340
    with pytest.raises(ConfigError, match=r"has room for 350 .*lower it") as caught:
        count_device_blocks(with_cache(config, num_gpu_blocks_override=351), 2 * MIB, 0, memory)
    assert caught.value.param == "num_gpu_blocks_override"


@pytest.mark.parametrize(
    ("peak", "match"),
    [(450, "leaves none for the KV cache .*raise it"), (395, "leaves 2 blocks of 16 tokens.*32 or less")],
)
def test_too_little_is_said_with_what_to_do(config: EngineConfig, peak: int, match: str) -> None:
    memory = MemoryProfile(total=1000 * MIB, peak=peak * MIB, outside=100 * MIB)
    with pytest.raises(ConfigError, match=match) as caught:
        count_device_blocks(config, 2 * MIB, 0, memory)
    assert caught.value.param == "gpu_memory_utilization"


def test_the_peak_of_all_steps_is_taken_and_graphs_by_themselves() -> None:
    machine = Machine(1 << 30, outside=64 * MIB)
    with fake_cuda.installed(machine):
        accelerator = FakeAccelerator(machine)
        with accelerator.active():
            weights = torch.zeros(10 * MIB, dtype=torch.uint8, device=CUDA)

            def step(size: int) -> None:
                torch.zeros(size * MIB, dtype=torch.uint8, device=CUDA)

            found = profile(accelerator, [lambda: step(30), lambda: step(20)], lambda: step(5))
            del weights
    assert found == MemoryProfile(1 << 30, 40 * MIB, 64 * MIB, 5 * MIB)


def test_a_device_filled_to_its_share_holds_the_largest_step(checkpoint: Path) -> None:
    """Every block there is room for, graphs and swap staging included, and requests that use them."""
    machine = Machine(24 * MIB, outside=MIB)
    options = {"gpu_memory_utilization": 1.0, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    options["enable_prefix_caching"] = True
    with (
        fake_cuda.installed(machine),
        LLM(str(checkpoint), dtype="float32", device="cuda", preemption_mode="swap", **options) as llm,
    ):
        assert machine.total - machine.outside - machine.allocated < 8 * MIB
        params = SamplingParams(temperature=1.0, top_p=0.9, top_k=100, max_tokens=8, presence_penalty=0.1)
        prompts = [[9 + (seed * place) % 200 for place in range(100)] for seed in range(8)]
        outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
        assert len(outputs) == 8
        blocks = llm.llm_engine.core.blocks.num_blocks
    assert blocks > 8 * 8


def test_sizes_of_captured_batches() -> None:
    assert [graphs.batch_sizes(most) for most in (1, 2, 3, 5, 9)] == [
        [1],
        [1, 2],
        [1, 2, 4],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 16],
    ]
    assert len(graphs.batch_sizes(256)) == 35 and graphs.batch_sizes(1000)[-1] == 256
    # 8 KV heads of 128 in bfloat16, 8192 tokens: 32 MiB a row.
    assert graphs.gathered_sizes(graphs.batch_sizes(64), 32 * MIB) == [1, 2, 4, 8, 16]


def test_block_copies_that_depend_on_others_come_after_them() -> None:
    class Numbers:
        def __init__(self) -> None:
            self.added: list[list[int]] = []

        def add(self, array: Any) -> int:
            self.added.append(array.tolist())
            return len(self.added) - 1

    numbers: Any = Numbers()
    pairs = [(1, 2), (1, 3), (3, 4), (5, 4), (6, 7)]
    sections = swap.pack_copies(pairs, numbers)
    groups = [
        list(zip(numbers.added[source], numbers.added[target], strict=True)) for source, target in sections
    ]
    assert groups == [[(1, 2), (1, 3)], [(3, 4)], [(5, 4), (6, 7)]]
