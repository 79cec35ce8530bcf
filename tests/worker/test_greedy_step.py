"""The native greedy step gives what the step of several operations gives, bit for bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from aserve import LLM, SamplingParams
from aserve.errors import ConfigError
from aserve.messages.step import NewSequence, StepPlan, StepResult
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
        assert sum(taken) >= 4
        taken.clear()
        answers(llm, 2, logprobs=1)
        assert taken and not any(taken)
        monkeypatch.setattr(Worker, "_is_greedy", lambda self, plan: False)
        assert [answers(llm, 1), answers(llm, 5)] == found


@pytest.mark.parametrize("model", ["smollm2", "gemma3-270m"])
def test_several_steps_are_single_steps(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[StepPlan] = []
    run = Worker._run

    def watched(self: Worker, plan: StepPlan) -> StepResult:
        plans.append(plan)
        return run(self, plan)

    monkeypatch.setattr(Worker, "_run", watched)
    found = []
    for steps in (None, 1):
        plans.clear()
        with LLM(model, max_model_len=128, max_num_seqs=8, num_scheduler_steps=steps) as llm:
            found.append([answers(llm, 1), answers(llm, 5)])
        assert (max(plan.max_steps for plan in plans) > 1) == (steps is None)
    assert found[0] == found[1]


def loaded(llm: LLM, prompt: list[int]) -> tuple[Worker, list[int]]:
    """The worker of an engine, its slot 0 filled with ``prompt``, and the 16 tokens that follow."""
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    (output,) = llm.generate(prompt_token_ids=[prompt], sampling_params=params, use_tqdm=False)
    worker = llm.llm_engine.executor._worker
    new = NewSequence(0, 0, prompt, len(prompt), [0, 1, 2], params, 0)
    worker.launch(StepPlan(0, [0], [0], [len(prompt)], [(0, 0)], new=[new], num_prefill_rows=1))
    return worker, output.outputs[0].token_ids


def test_what_ends_a_run() -> None:
    with LLM("smollm2", max_model_len=128, max_num_seqs=2) as llm:
        prompt = [5, 77, 900, 1234, 42]
        worker, expected = loaded(llm, prompt)

        def run(steps: int, end: int = -1, number: int = 9, **options: float) -> list[int]:
            worker.sampler.ends[0] = end
            plan = StepPlan(number, [0], [len(prompt)], [1], [(0, 0)], max_steps=steps, **options)
            result = worker.launch(plan).wait()
            assert len(result.token_ids) == len(result.logprobs) == result.steps
            return result.token_ids

        assert run(12) == expected[1:13]
        assert run(1) == expected[1:2]
        end = expected[6]
        assert run(12, end) == expected[1 : expected.index(end, 1) + 1]
        assert run(12, seconds=0.0) == expected[1:2]
        worker.interrupt(9)
        assert run(12) == expected[1:2]
        assert run(12, number=10) == expected[1:13], "it was meant for an earlier plan"


def test_more_steps_than_the_model_can_make_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_scheduler_steps must be at most 16"):
        LLM("smollm2", max_model_len=128, num_scheduler_steps=17)


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


def test_a_row_that_fails_in_a_later_step() -> None:
    sampler = SamplerState(4, 3, torch.device("cpu"))
    for slot in (1, 2):
        sampler.add(slot, SamplingParams(temperature=0), 0, [1], [], None)
    logits = torch.tensor([[0.0, float("nan"), 2.0], [0.0, 1.0, 2.0]])
    token_ids, logprobs = [2, 1, 1, 2], [-0.4, -0.1, float("nan"), -0.4]
    assert sampler.take_likeliest([1, 2], token_ids, logprobs, logits) == {2: "the logits are not finite"}
    assert token_ids == [2, 1, 0, 2] and logprobs[3] == pytest.approx(-0.4)
