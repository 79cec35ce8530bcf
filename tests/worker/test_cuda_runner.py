"""The whole engine on a fake GPU gives the tokens it gives on the CPU, and those of transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aserve import LLM, AsyncEngineArgs, AsyncLLMEngine, GuidedParams, SamplingParams
from aserve.errors import ConfigError, RequestFailedError
from tests import tiny_checkpoint
from tests.worker import fake_cuda

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the fake stands in for a GPU that is not there"),
]

BROKEN = 258
"""A token whose embedding is not a number in the broken checkpoint."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"), weights=True)


@pytest.fixture(scope="module")
def broken_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint.write(tmp_path_factory.mktemp("broken"), weights=True)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][BROKEN] = float("nan")
    # Of two tokens with the same logits the first is drawn: never this one.
    weights["lm_head.weight"][BROKEN] = weights["lm_head.weight"][BROKEN - 1]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def machine() -> Iterator[fake_cuda.Machine]:
    with fake_cuda.installed(fake_cuda.Machine(1 << 30, 1 << 20)) as machine:
        yield machine


def prompt(seed: int, length: int) -> list[int]:
    return [5 + (seed * 31 + place * place * 7 + place * 3) % 240 for place in range(length)]


def avoid_sevens(output: list[int], row: torch.Tensor) -> torch.Tensor:
    row[7::10] = float("-inf")
    return row


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Greedy ones of many lengths, and one or two of everything else there is."""
    greedy = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
    drawn = {"seed": 11, "max_tokens": 10, "ignore_eos": True}
    shared = prompt(3, 33)
    found = [
        *((prompt(i, length), SamplingParams(**greedy)) for i, length in enumerate((1, 2, 15, 16, 17, 50))),
        ([*shared, 9, 8], SamplingParams(**greedy)),
        ([*shared, 10], SamplingParams(**greedy, logprobs=3, prompt_logprobs=2)),
        (prompt(8, 20), SamplingParams(**drawn, temperature=0.9)),
        (prompt(9, 21), SamplingParams(**drawn, temperature=0.8, n=3)),
        (
            [*shared, 11],
            SamplingParams(**drawn, temperature=1.2, top_k=20, top_p=0.9, min_p=0.01, logprobs=2),
        ),
        (prompt(10, 9), SamplingParams(temperature=0.0, min_tokens=6, max_tokens=9)),
        (
            prompt(11, 9),
            SamplingParams(**greedy, repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1),
        ),
        (prompt(12, 14), SamplingParams(**greedy, logits_processors=[avoid_sevens], logit_bias={40: 2.0})),
        (
            prompt(13, 7),
            SamplingParams(temperature=0.0, max_tokens=12, guided=GuidedParams(regex="[a-f]{4,8}")),
        ),
        (
            prompt(14, 18),
            SamplingParams(temperature=0.0, max_tokens=8, use_beam_search=True, n=2, best_of=3),
        ),
        (prompt(15, 1), SamplingParams(temperature=0.0, max_tokens=1)),
    ]
    return found


def answers(llm: LLM) -> list[Any]:
    asked = requests()
    outputs = llm.generate(
        prompt_token_ids=[ids for ids, _ in asked],
        sampling_params=[params for _, params in asked],
        use_tqdm=False,
    )
    core = llm.llm_engine.core
    assert core.blocks.num_free == core.blocks.num_blocks
    return outputs


def entries(lists: Any) -> Iterator[tuple[int, float]]:
    for entry in lists or ():
        yield from ((token, each.logprob) for token, each in (entry or {}).items())


def check(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert one.token_ids == other.token_ids
            assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
            assert dict(entries(one.logprobs)) == pytest.approx(dict(entries(other.logprobs)), abs=1e-3)
        listed = dict(entries(theirs.prompt_logprobs))
        assert dict(entries(ours.prompt_logprobs)) == pytest.approx(listed, abs=1e-3)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"max_num_seqs": 24},
    "one by one": {"max_num_seqs": 5, "overlap": 0, "block_size": 8},
    "chunks": {"max_num_seqs": 24, "enable_chunked_prefill": True, "max_num_batched_tokens": 24},
    "swap": {"max_num_seqs": 24, "num_gpu_blocks_override": 18, "preemption_mode": "swap"},
    "recompute": {
        "max_num_seqs": 24,
        "num_gpu_blocks_override": 18,
        "preemption_mode": "recompute",
        "enable_prefix_caching": True,
    },
}


def build(checkpoint: Path, **options: Any) -> LLM:
    return LLM(str(checkpoint), dtype="float32", **options)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[Any]:
    with build(checkpoint, device="cpu", max_num_seqs=24) as llm:
        return answers(llm)


@pytest.mark.parametrize(
    ("case", "eager"),
    [
        pytest.param(
            case,
            eager,
            id=f"{case}-{'eager' if eager else 'graphs'}",
            marks=pytest.mark.slow if eager and case not in ("plain", "swap") else (),
        )
        for case in OPTIONS
        for eager in (False, True)
    ],
)
def test_the_same_tokens_as_on_the_cpu(
    checkpoint: Path, machine: fake_cuda.Machine, expected: list[Any], case: str, eager: bool
) -> None:
    options = OPTIONS[case]
    with build(checkpoint, device="cuda", enforce_eager=eager, **options) as llm:
        check(answers(llm), expected)
        check(answers(llm), expected)  # a warm prefix cache, slots used before
        core = llm.llm_engine.core
        assert (core.num_preemptions > 0) == ("num_gpu_blocks_override" in options)
        assert (core.prefix_counts.hits > 0) == bool(llm.llm_engine.config.cache.enable_prefix_caching)
    assert (machine.replays > 10) == (not eager)


def test_greedy_tokens_are_those_of_transformers(checkpoint: Path, machine: fake_cuda.Machine) -> None:
    from transformers import AutoModelForCausalLM

    oracle: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompts = [prompt(seed, length) for seed, length in ((1, 3), (2, 30), (3, 64))]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with build(checkpoint, device="cuda", max_num_seqs=3) as llm:
        outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
    for ids, output in zip(prompts, outputs, strict=True):
        told = oracle.generate(
            torch.tensor([ids]), max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert output.outputs[0].token_ids == told[0, len(ids) :].tolist()


def test_no_step_waits_for_the_device(checkpoint: Path, machine: fake_cuda.Machine) -> None:
    """Greedy and drawn rows, prompts in chunks, forks and their copies, preemption: none needs the host."""
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=2)
    drawn = SamplingParams(
        temperature=0.9, top_p=0.9, seed=3, n=2, max_tokens=20, min_tokens=4, frequency_penalty=0.3
    )
    for swap in ("swap", "recompute"):
        with build(
            checkpoint,
            device="cuda",
            max_num_seqs=8,
            max_num_batched_tokens=16,
            num_gpu_blocks_override=12,
            preemption_mode=swap,
        ) as llm:
            machine.stalls.clear()
            outputs = llm.generate(
                prompt_token_ids=[prompt(seed, 30) for seed in range(8)],
                sampling_params=[greedy if seed % 2 else drawn for seed in range(8)],
                use_tqdm=False,
            )
            assert len(outputs) == 8 and llm.llm_engine.core.num_preemptions > 0
            assert machine.stalls == []
            staging = llm.llm_engine.executor._worker.staging
            assert staging.num_buffers <= 4


def test_a_row_that_is_not_finite_fails_alone(broken_checkpoint: Path, machine: fake_cuda.Machine) -> None:
    async def run() -> tuple[list[int], str]:
        args = AsyncEngineArgs(model=str(broken_checkpoint), device="cuda", dtype="float32", max_num_seqs=4)
        engine = AsyncLLMEngine.from_engine_args(args)
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)

        async def one(name: str, ids: list[int]) -> list[int]:
            async for output in engine.generate(None, params, name, prompt_token_ids=ids):
                last = output
            return list(last.outputs[0].token_ids)

        try:
            fine, broken = await asyncio.gather(
                one("fine", prompt(2, 15)), one("broken", [9, BROKEN, 9]), return_exceptions=True
            )
            again = await one("again", prompt(2, 15))
        finally:
            await engine.stop()
        assert isinstance(broken, RequestFailedError)
        assert fine == again
        return again, str(broken)

    tokens, reason = asyncio.run(run())
    assert "not finite" in reason
    with build(broken_checkpoint, device="cpu") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        (output,) = llm.generate(prompt_token_ids=[prompt(2, 15)], sampling_params=params, use_tqdm=False)
    assert output.outputs[0].token_ids == tokens


def test_vectors(checkpoint: Path, machine: fake_cuda.Machine) -> None:
    prompts = [prompt(seed, length) for seed, length in ((1, 3), (2, 40))]
    vectors = []
    for device in ("cpu", "cuda"):
        with build(checkpoint, device=device, max_num_seqs=4) as llm:
            outputs = llm.encode(prompt_token_ids=prompts, use_tqdm=False)
            vectors.append([output.outputs.embedding for output in outputs])
    for ours, theirs in zip(*vectors, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_an_abort_leaves_the_others_alone(checkpoint: Path, machine: fake_cuda.Machine) -> None:
    async def run() -> list[int]:
        args = AsyncEngineArgs(model=str(checkpoint), device="cuda", dtype="float32", max_num_seqs=4)
        engine = AsyncLLMEngine.from_engine_args(args)
        params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)

        async def leave(name: str) -> None:
            count = 0
            async for _ in engine.generate(None, params, name, prompt_token_ids=prompt(5, 20)):
                count += 1
                if count == 3:
                    return

        async def stay() -> list[int]:
            async for output in engine.generate(None, params, "stays", prompt_token_ids=prompt(6, 20)):
                last = output
            return list(last.outputs[0].token_ids)

        try:
            tokens, *_ = await asyncio.gather(stay(), leave("a"), leave("b"))
            assert tokens == await stay_again(engine, params)
        finally:
            await engine.stop()
        return tokens

    async def stay_again(engine: AsyncLLMEngine, params: SamplingParams) -> list[int]:
        async for output in engine.generate(None, params, "again", prompt_token_ids=prompt(6, 20)):
            last = output
        return list(last.outputs[0].token_ids)

    assert len(asyncio.run(run())) == 30


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"gpu_memory_utilization": 0.0011},
            "gpu_memory_utilization: 0.0011 of the device's .* none",
        ),
        ({"num_gpu_blocks_override": 10**7}, "num_gpu_blocks_override: 10000000 blocks of .* do not fit"),
    ],
)
def test_too_little_memory_is_said_at_start(
    checkpoint: Path, machine: fake_cuda.Machine, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        build(checkpoint, device="cuda", max_num_seqs=4, **options)
