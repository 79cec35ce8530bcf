"""The native greedy step gives what the step of several operations gives, bit for bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from aserve import LLM, SamplingParams
from aserve.messages.step import StepPlan
from aserve.ops import native
from aserve.sampling.sampler import SamplerState
from aserve.worker.worker import Worker

pytestmark = pytest.mark.skipif(native.level() == "reference", reason="it is one of the native kernels")


def answers(llm: LLM, count: int, **options: Any) -> list[tuple[list[int], float]]:
    rng = random.Random(count)
    prompts = [[rng.randrange(10, 40_000) for _ in range(rng.randint(1, 40))] for _ in range(count)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, **options)
    outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
    return [(output.outputs[0].token_ids, output.outputs[0].cumulative_logprob) for output in outputs]


@pytest.mark.parametrize("model", ["smollm2", "gemma3-270m"])
def test_same_bits(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    is_greedy = Worker._is_greedy

    def watched(self: Worker, plan: StepPlan) -> bool:
        taken.append(is_greedy(self, plan))
        return taken[-1]

    with LLM(model, max_model_len=128, max_num_seqs=8) as llm:
        monkeypatch.setattr(Worker, "_is_greedy", watched)
        found = [answers(llm, 1), answers(llm, 5)]
        assert sum(taken) >= 2 * 19
        taken.clear()
        answers(llm, 2, logprobs=1)
        assert taken and not any(taken)
        monkeypatch.setattr(Worker, "_is_greedy", lambda self, plan: False)
        assert [answers(llm, 1), answers(llm, 5)] == found


def test_a_row_without_a_likeliest_token_fails_alone() -> None:
    sampler = SamplerState(4, 3, torch.device("cpu"))
    for slot in (1, 2):
        sampler.add(slot, SamplingParams(temperature=0), 0, [1], [], None)
    assert sampler.only_likeliest([1, 2])
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 2.0]])
    token_ids, logprobs = [2, 1], [-0.4, float("nan")]
    failed = sampler.take_likeliest([1, 2], token_ids, logprobs, logits)
    assert failed == {1: "the logits are not finite"}
    assert (token_ids, logprobs[0], logprobs[1]) == ([2, 0], pytest.approx(-0.4), 0.0)
    sampler.add(2, SamplingParams(temperature=0.5), 0, [1], [], None)
    assert not sampler.only_likeliest([1, 2])
