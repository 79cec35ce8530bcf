"""Greedy tokens equal those of transformers, however the engine is configured; logprobs agree."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from aserve import LLM, SamplingParams
from aserve.ops import native
from tests.parity.make_golden import MODELS, golden_path, greedy, load_oracle
from tests.parity.prompts import NUM_TOKENS, PROMPTS

pytestmark = pytest.mark.timeout(600)

TOLERANCE = 1e-3


def golden(name: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(golden_path(name).read_text())
    return entries


def params(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, **options)


@pytest.fixture(autouse=True)
def the_level_asked_for() -> None:
    """A run at a level must not quietly be one at another."""
    assert os.environ.get(native.LEVEL_VARIABLE, "auto") in ("auto", native.level())


def check(name: str, outputs: list[Any], entries: list[dict[str, Any]]) -> None:
    for output, entry in zip(outputs, entries, strict=True):
        assert output.prompt_token_ids == entry["ids"], output.prompt
        assert output.outputs[0].token_ids == entry["tokens"], (name, output.prompt)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_golden_file_is_what_transformers_says(name: str) -> None:
    """The stored answers are checked against the library itself on a few prompts."""
    model, tokenizer = load_oracle(name)
    entries = golden(name)
    assert len(entries) == len(PROMPTS)
    for index in (1, 17):
        fresh = greedy(model, tokenizer.encode(PROMPTS[index]), 16)
        assert fresh["ids"] == entries[index]["ids"]
        assert fresh["tokens"] == entries[index]["tokens"][:16]


CONFIGURATIONS = [
    {"block_size": 16, "overlap": 1},
    {"block_size": 8, "overlap": 0},
    {"block_size": 32, "overlap": 1},
    {"block_size": 16, "overlap": 1, "enable_chunked_prefill": True, "max_num_batched_tokens": 48},
]


# The quick run takes every configuration on the one model and two of them on the other.
BATCHES = [
    pytest.param(name, options, id=f"{name}-{'-'.join(map(str, options.values()))}", marks=marks)
    for name in MODELS
    for options, marks in zip(
        CONFIGURATIONS,
        ([], [], [], []) if name == "smollm2" else ([], pytest.mark.slow, pytest.mark.slow, []),
        strict=True,
    )
]


@pytest.mark.parametrize(("name", "options"), BATCHES)
def test_a_mixed_batch_of_32(name: str, options: dict[str, Any]) -> None:
    max_num_seqs = 32
    with LLM(name, dtype="float32", max_model_len=512, max_num_seqs=max_num_seqs, **options) as llm:
        check(name, llm.generate(PROMPTS, params(), use_tqdm=False), golden(name))


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("smollm2", slice(0, 20)),
        ("gemma3-270m", slice(0, 5)),
        pytest.param("gemma3-270m", slice(5, 20), marks=pytest.mark.slow),
    ],
)
def test_one_at_a_time_with_logprobs(name: str, prompts: slice) -> None:
    entries = golden(name)
    with LLM(name, dtype="float32", max_model_len=512) as llm:
        for prompt, entry in list(zip(PROMPTS, entries, strict=True))[prompts]:
            (output,) = llm.generate(prompt, params(logprobs=5), use_tqdm=False)
            check(name, [output], [entry])
            for position, (ours, theirs) in enumerate(
                zip(output.outputs[0].logprobs, entry["top"], strict=True)
            ):
                assert set(ours) == {token for token, _ in theirs}, position
                for token, logprob in theirs:
                    assert abs(ours[token].logprob - logprob) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_so_small_that_requests_are_preempted(name: str) -> None:
    with LLM(
        name, dtype="float32", max_model_len=320, num_gpu_blocks_override=64, block_size=16, max_num_seqs=32
    ) as llm:
        check(name, llm.generate(PROMPTS, params(), use_tqdm=False), golden(name))
        assert llm.llm_engine.core.num_preemptions > 0
        assert llm.llm_engine.core.blocks.num_free == 64
