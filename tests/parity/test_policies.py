"""How requests are scheduled and where their keys and values are kept changes none of their tokens."""

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

COUNT, LENGTH = 64, 12


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of 1 to 130 tokens, two thirds of which begin like others; greedy, and some drawn."""
    rng = random.Random(5)
    beginnings = [[rng.randrange(10, 40_000) for _ in range(length)] for length in (0, 40, 77)]
    prompts = [
        beginnings[i % 3] + [rng.randrange(10, 40_000) for _ in range(rng.randint(1, 50))]
        for i in range(COUNT)
    ]
    drawn = {"temperature": 0.9, "top_p": 0.9, "n": 2}
    params = [
        SamplingParams(max_tokens=LENGTH, ignore_eos=True, seed=i, **({"temperature": 0} if i % 4 else drawn))
        for i in range(COUNT)
    ]
    return prompts, params


def answers(llm: LLM) -> list[Any]:
    prompts, params = requests()
    outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
    return [[(each.index, each.token_ids) for each in output.outputs] for output in outputs]


def build(name: str, **options: Any) -> LLM:
    return LLM(name, dtype="float32", **{"max_model_len": 256, "max_num_seqs": 64, **options})


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Any]]:
    return {}


CACHING = {"enable_prefix_caching": True}
TINY = {"num_gpu_blocks_override": 48}
CASES: dict[str, dict[str, Any]] = {
    "caching": CACHING,
    "everything": {
        **CACHING,
        **TINY,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 64,
        "preemption_mode": "swap",
        "num_lookahead_slots": 2,
    },
    "swap": {**TINY, "preemption_mode": "swap"},
    "recompute": {**TINY, "preemption_mode": "recompute"},
    "recompute caching": {**TINY, **CACHING, "preemption_mode": "recompute"},
    "chunks 16": {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "max_num_seqs": 16},
    "chunks 64 caching": {**CACHING, "enable_chunked_prefill": True, "max_num_batched_tokens": 64},
    "chunks 512": {"enable_chunked_prefill": True, "max_num_batched_tokens": 512},
    "blocks 8 caching": {**CACHING, "block_size": 8},
    "blocks 32 caching": {**CACHING, "block_size": 32},
    "one by one caching": {**CACHING, "overlap": 0, "block_size": 8, "max_num_seqs": 5},
}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(
            name,
            case,
            marks=() if name == "smollm2" and case in ("caching", "everything") else pytest.mark.slow,
        )
        for name in ("smollm2", "gemma3-270m")
        for case in CASES
    ],
)
def test_the_same_tokens(name: str, case: str, expected: dict[str, list[Any]]) -> None:
    if name not in expected:
        with build(name) as llm:
            expected[name] = answers(llm)
    options = CASES[case]
    with build(name, **options) as llm:
        core = llm.llm_engine.core
        for _ in range(2 if "caching" in case or case == "everything" else 1):  # a cold cache, a warm one
            assert answers(llm) == expected[name]
        assert (core.prefix_counts.hits > 0) == ("enable_prefix_caching" in options)
        assert (core.num_preemptions > 0) == ("num_gpu_blocks_override" in options)
        assert core.blocks.num_free == core.blocks.num_blocks
