"""A sequence's tokens and log-probabilities are bit for bit the same whatever runs beside it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from aserve import LLM, SamplingParams
from aserve.ops import native

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(native.level() == "reference", reason="torch's products depend on the batch"),
]

COUNT, LENGTH = 64, 8


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of 1 to 90 tokens; greedy and drawn, with and without log-probabilities."""
    rng = random.Random(7)
    prompts = [[rng.randrange(10, 40_000) for _ in range(rng.randint(1, 90))] for _ in range(COUNT)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0, "logprobs": 3},
        {"temperature": 1.1, "top_k": 40, "repetition_penalty": 1.2},
    ]
    params = [
        SamplingParams(max_tokens=LENGTH, ignore_eos=True, seed=i, **kinds[i % len(kinds)])
        for i in range(COUNT)
    ]
    return prompts, params


def answers(llm: LLM, order: list[int]) -> list[tuple[list[int], float, Any]]:
    prompts, params = requests()
    outputs = llm.generate(
        prompt_token_ids=[prompts[i] for i in order],
        sampling_params=[params[i] for i in order],
        use_tqdm=False,
    )
    found = {
        i: (output.outputs[0].token_ids, output.outputs[0].cumulative_logprob, output.outputs[0].logprobs)
        for i, output in zip(order, outputs, strict=True)
    }
    return [found[i] for i in sorted(found)]


@pytest.fixture(scope="module", params=["float32", "auto"])
def dtype(request: pytest.FixtureRequest) -> str:
    """Exact arithmetic, and what a user gets who names no type."""
    return str(request.param)


@pytest.fixture(scope="module")
def alone(dtype: str) -> list[tuple[list[int], float, Any]]:
    with LLM("smollm2", dtype=dtype, max_model_len=256) as llm:
        return [answers(llm, [i])[0] for i in range(COUNT)]


SHUFFLED = random.Random(1).sample(range(COUNT), COUNT)


@pytest.mark.parametrize(
    ("order", "options"),
    [
        (list(range(COUNT)), {}),
        (SHUFFLED, {"max_num_seqs": 7, "block_size": 8}),
        (SHUFFLED, {"enable_chunked_prefill": True, "max_num_batched_tokens": 128, "max_num_seqs": 64}),
        (list(range(COUNT)), {"max_model_len": 128, "num_gpu_blocks_override": 40, "max_num_seqs": 64}),
        (SHUFFLED[::-1], {"overlap": 0, "block_size": 32}),
    ],
    ids=["together", "seven-at-a-time", "chunks", "preempted", "backwards"],
)
def test_together_as_alone(
    order: list[int], options: dict[str, Any], dtype: str, alone: list[tuple[list[int], float, Any]]
) -> None:
    with LLM("smollm2", dtype=dtype, **({"max_model_len": 256} | options)) as llm:
        assert answers(llm, order) == alone
        if "num_gpu_blocks_override" in options:
            assert llm.llm_engine.core.num_preemptions > 0
