"""Rows that cannot be sampled end alone; logits processors and what may go wrong in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from aserve.messages.params import SamplingParams
from tests.sampling.harness import entry, run, sample, state_of
from tests.sampling.oracle import Case

VOCAB = 40
NEIGHBOURS = [
    {"temperature": 0},
    {"seed": 3, "top_p": 0.8, "logprobs": 3},
    {"presence_penalty": 1.0, "temperature": 0.5},
    {"min_tokens": 4, "top_k": 5},
]


def batch_with(odd: Case) -> list[Case]:
    others = [Case(SamplingParams(**options), 7 + i, [1, 2], [4]) for i, options in enumerate(NEIGHBOURS)]
    return [*others[:2], odd, *others[2:]]


def check_neighbours(odd: Case, logits: np.ndarray) -> str:
    """Samples ``odd`` as the third of five; returns why it failed."""
    cases = batch_with(odd)
    state = state_of(cases, VOCAB)
    usual = np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    first = run(state, logits, list(range(5)), list(range(5)))
    second = run(state, usual, list(range(5)), list(range(5)))
    assert set(first.failed) == {2}
    for i, case in enumerate(cases):
        if i != 2:
            alone = state_of([case], VOCAB)
            assert entry(run(alone, logits[i : i + 1], [0], [0]), 0) == entry(first, i)
            assert entry(run(alone, usual[i : i + 1], [0], [0]), 0) == entry(second, i)
    assert 0 <= int(first.token_ids[2]) < VOCAB  # meaningless, but still an index
    return first.failed[2]


def normal_logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, VOCAB)).astype(np.float32)


ODD: list[dict[str, Any]] = [
    {"temperature": 0},
    {"logprobs": 5},
    {"top_p": 0.5, "top_k": 9},
    {"min_p": 0.1},
    {"repetition_penalty": 1.5, "frequency_penalty": 1.0},
]


@pytest.mark.parametrize("options", ODD)
@pytest.mark.parametrize("bad", ["nan", "one nan", "inf", "all -inf"])
def test_logits_that_are_no_distribution(options: dict[str, Any], bad: str) -> None:
    logits = normal_logits()
    if bad == "nan":
        logits[2] = np.nan
    elif bad == "one nan":
        logits[2, 17] = np.nan
    elif bad == "inf":
        logits[2, 5] = np.inf
    else:
        logits[2] = -np.inf
    reason = check_neighbours(Case(SamplingParams(**options), 1, [1], [3]), logits)
    assert reason == ("no token is allowed" if bad == "all -inf" else "the logits are not finite")


def test_everything_forbidden_by_parameters() -> None:
    logits = normal_logits()
    logits[2] = -np.inf
    logits[2, 5] = 1.0
    params = SamplingParams(min_tokens=3, stop_token_ids=[5])
    assert check_neighbours(Case(params, 1, [1], []), logits) == "no token is allowed"


def raising(output_ids: list[int], row: torch.Tensor) -> torch.Tensor:
    row.fill_(float("nan"))  # its own copy: nobody else may see it
    raise RuntimeError("out of ideas")


def reading_past_the_end(output_ids: list[int], row: torch.Tensor) -> torch.Tensor:
    row[VOCAB] = 1.0
    return row


BROKEN: list[tuple[Callable[..., Any], str]] = [
    (raising, "RuntimeError: out of ideas"),
    (reading_past_the_end, "IndexError"),
    (lambda ids, row: None, "TypeError"),
    (lambda ids, row: row[:-1], "TypeError"),
    (lambda ids, row: row.unsqueeze(0), "TypeError"),
    (lambda ids, row: row.tolist(), "TypeError"),
    (lambda ids, row: row / 0.0 * 0.0, "not finite"),
    (lambda ids, row: row.fill_(float("-inf")), "no token is allowed"),
    (lambda row: row, "TypeError"),
]


@pytest.mark.parametrize(("processor", "reason"), BROKEN)
def test_a_broken_processor_ends_its_own_request(processor: Any, reason: str) -> None:
    params = SamplingParams(logits_processors=[processor], repetition_penalty=1.1)
    assert reason in check_neighbours(Case(params, 1, [1], []), normal_logits())


def test_a_bias_outside_the_vocabulary_ends_its_own_request() -> None:
    params = SamplingParams(logit_bias={VOCAB: 1.0})
    assert "IndexError" in check_neighbours(Case(params, 1, [1], []), normal_logits())


def test_rows_shared_with_a_failing_processor() -> None:
    broken = Case(SamplingParams(temperature=0, logits_processors=[raising]), 0, [1], [])
    plain = Case(SamplingParams(temperature=0), 0, [1], [])
    logits = normal_logits()[:1]
    sampled = sample([plain, broken, plain], logits, [0, 0, 0])
    assert set(sampled.failed) == {1}
    assert sampled.token_ids[0] == sampled.token_ids[2] == logits[0].argmax()


def test_processors_see_ids_and_run_in_order_after_the_bias() -> None:
    calls: list[Any] = []

    def two(output_ids: list[int], row: torch.Tensor) -> torch.Tensor:
        calls.append((list(output_ids), row[7].item()))
        output_ids.append(99)  # theirs to spoil
        return row + 1.0

    def three(prompt_ids: list[int], output_ids: list[int], row: torch.Tensor) -> torch.Tensor:
        calls.append((list(prompt_ids), list(output_ids), row[7].item()))
        prompt_ids.clear()
        row[7] += 100.0
        return row.double()

    params = SamplingParams(temperature=0, logit_bias={7: 2.0}, logits_processors=[two, three])
    state = state_of([Case(params, 0, [1, 2], [3])], VOCAB)
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    assert run(state, logits, [0], [0]).token_ids.tolist() == [7]
    assert run(state, logits, [0], [0]).token_ids.tolist() == [7]
    assert calls == [([3], 2.0), ([1, 2], [3], 3.0), ([3, 7], 2.0), ([1, 2], [3, 7], 3.0)]


def test_a_processor_may_keep_its_row() -> None:
    kept: list[torch.Tensor] = []

    def keep(output_ids: list[int], row: torch.Tensor) -> torch.Tensor:
        kept.append(row)
        return row

    params = SamplingParams(temperature=0.5, top_k=1, presence_penalty=1, logits_processors=[keep])
    logits = normal_logits()
    sample([Case(params, i, [1], [2]) for i in range(5)], logits)
    np.testing.assert_array_equal(torch.stack(kept).numpy(), logits)


class Method:
    def __init__(self) -> None:
        self.arguments = 0

    def three(self, prompt_ids: list[int], output_ids: list[int], row: torch.Tensor) -> torch.Tensor:
        self.arguments = 3
        return row

    def __call__(self, *arguments: Any) -> torch.Tensor:
        self.arguments = len(arguments)
        return arguments[-1]


class Two(Method):
    def __call__(self, output_ids: list[int], row: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        assert isinstance(row, torch.Tensor) and strength in (1.0, 2.0)
        self.arguments = 2
        return row


def test_how_many_arguments_a_processor_is_given() -> None:
    """Three where three are needed; settings with a default, or filled in by partial, are not counted."""
    star, two, partial, method, three = Method(), Two(), Two(), Method(), Method()
    processors = [
        star,
        two,
        functools.partial(partial, strength=2.0),
        method.three,
        functools.partial(Method.three, three),
    ]
    params = SamplingParams(logits_processors=processors)
    assert not sample([Case(params, 0, [1], [])], normal_logits()[:1]).failed
    counts = [each.arguments for each in (star, two, partial, method, three)]
    assert counts == [2, 2, 2, 3, 3]


def test_min_tokens_masks_every_token_that_ends() -> None:
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, [2, 8, 9]] = 5.0, 4.0, 3.0  # 2 is the end-of-sequence token
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[8, VOCAB + 5], ignore_eos=True)
    state = state_of([Case(params, 0, [1], [])], VOCAB)
    assert [int(run(state, logits, [0], [0]).token_ids[0]) for _ in range(3)] == [9, 9, 2]


def test_min_tokens_without_a_token_to_mask() -> None:
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, 2] = 5.0
    state = state_of([Case(SamplingParams(temperature=0), 0, [1], [])], VOCAB)
    state.add(0, SamplingParams(temperature=0, min_tokens=3), 0, [1], [], None)
    assert run(state, logits, [0], [0]).token_ids.tolist() == [2]


def test_an_empty_prompt_can_be_penalised() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.0, presence_penalty=2.0)
    state = state_of([Case(params, 0, [], [])], VOCAB)
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, :3] = 3.0, 2.5, 2.0
    assert [int(run(state, logits, [0], [0]).token_ids[0]) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1e-5}, {"logprobs": 3}])
def test_the_least_penalty_leaves_logits_finite(options: dict[str, Any]) -> None:
    params = SamplingParams(repetition_penalty=5e-324, **options)
    state = state_of([Case(params, 0, [1, 2, 3], [])], VOCAB)
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, :4] = 90.0, 40.0, -40.0, 30.0  # of which the first was not seen
    sampled = run(state, logits, [0], [0])
    assert not sampled.failed
    assert sampled.token_ids.tolist() == [1]
    assert state.penalties(0)[0] > 0


def test_penalties_over_many_tokens() -> None:
    """More distinct tokens than room is made for at first."""
    vocab = 500
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    state = state_of([Case(params, 0, [3], [])], vocab)
    logits = np.linspace(1.0, 0.0, vocab, dtype=np.float32)[None]
    assert [int(run(state, logits, [0], [0]).token_ids[0]) for _ in range(vocab)] == list(range(vocab))
