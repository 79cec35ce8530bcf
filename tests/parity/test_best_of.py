"""Several sequences of one prompt: each is what it would be alone, and the best are the best."""

from __future__ import annotations

from typing import Any

import pytest

from aserve import LLM, SamplingParams
from tests.parity.prompts import PROMPTS

pytestmark = pytest.mark.timeout(600)

CHOSEN = [PROMPTS[place] for place in (1, 2, 15, 24)]
LENGTH = 24


def ask(llm: LLM, **options: Any) -> list[Any]:
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, seed=11, **options)
    return llm.generate(CHOSEN, params, use_tqdm=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_gpu_blocks_override": 20, "max_num_seqs": 12},
        {"enable_prefix_caching": True, "block_size": 8, "overlap": 0},
    ],
)
def test_the_best_of_several(options: dict[str, Any]) -> None:
    with LLM("smollm2", dtype="float32", **{"max_model_len": 256, "max_num_seqs": 32, **options}) as llm:
        everything = ask(llm, n=5)
        best = ask(llm, n=2, best_of=5)
        core = llm.llm_engine.core
        assert core.blocks.num_free == core.blocks.num_blocks
        assert ("num_gpu_blocks_override" in options) == (core.num_preemptions > 0)
        scored = []
        for whole, few in zip(everything, best, strict=True):
            outputs = sorted(whole.outputs, key=lambda each: -each.cumulative_logprob)
            assert sorted(each.index for each in outputs) == [0, 1, 2, 3, 4]
            assert len({tuple(each.token_ids) for each in outputs}) == 5
            # Those with the highest log-probability as a whole, in that order, under their own index.
            assert [(each.index, each.token_ids, each.cumulative_logprob) for each in few.outputs] == [
                (each.index, each.token_ids, each.cumulative_logprob) for each in outputs[:2]
            ]
            scored += [(whole.prompt_token_ids, each) for each in outputs]
        # The log-probability of each, computed in one piece and by nobody's fork.
        again = llm.generate(
            prompt_token_ids=[prompt + each.token_ids for prompt, each in scored],
            sampling_params=SamplingParams(max_tokens=1, prompt_logprobs=0),
            use_tqdm=False,
        )
        for (prompt, each), check in zip(scored, again, strict=True):
            entries = check.prompt_logprobs[len(prompt) :]
            total = sum(entry[token].logprob for token, entry in zip(each.token_ids, entries, strict=True))
            assert each.cumulative_logprob == pytest.approx(total, abs=1e-3)
