"""Rows that a device's kernel draws in one pass over their logits: here the CPU's stands for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from aserve import ops
from aserve.messages.params import SamplingParams
from aserve.ops import reference
from tests.sampling.harness import entry, run, state_of
from tests.sampling.oracle import EOS, Case

VOCAB = 60
PASSED: list[dict[str, Any]] = [
    {"temperature": 0.7, "seed": 1},
    {"seed": 5, "presence_penalty": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0, "frequency_penalty": 0.5},
    {"min_tokens": 4, "seed": 2},
    {"logit_bias": {3: 5.0}, "temperature": 2.0},
]
OTHERS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"top_p": 0.8, "seed": 3},
    {"seed": 4, "logprobs": 2},
    {"top_k": 5, "presence_penalty": 1.0},
]


def case_of(options: dict[str, Any], at: int = 0) -> Case:
    return Case(SamplingParams(**options), 7 + at, [1, 2], [4, 4, 9])


CASES = [case_of(options, at) for at, options in enumerate([*PASSED, *OTHERS])]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the kernel was given."""
    counts = []
    kernel = ops.sample

    def sample(logits: torch.Tensor, *columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts.append(len(logits))
        assert [each.dtype for each in columns] == [torch.float32, torch.int64, torch.int64]
        return kernel(logits, *columns)

    monkeypatch.setattr(ops, "samples", lambda device: True)
    monkeypatch.setattr(ops, "sample", sample)
    return counts


def logits_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, VOCAB)).astype(np.float32) * 2


def draw(cases: list[Case], logits: np.ndarray) -> list[tuple]:
    places = list(range(len(cases)))
    sampled = run(state_of(cases, VOCAB), logits, places, places)
    return [entry(sampled, i) for i in places]


def test_a_row_is_drawn_alike_in_every_batch(passes: list[int]) -> None:
    logits = logits_of(len(CASES))
    together = draw(CASES, logits)
    assert passes == [len(PASSED)]
    for i, case in enumerate(CASES):
        assert draw([case], logits[i : i + 1]) == [together[i]]
    assert passes == [len(PASSED)] + [1] * len(PASSED)


def test_other_rows_are_drawn_as_without_it(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(len(CASES))
    with_kernel = draw(CASES, logits)
    monkeypatch.undo()
    without = draw(CASES, logits)
    assert with_kernel[len(PASSED) :] == without[len(PASSED) :]
    assert with_kernel[2] == without[2], "the likeliest token is one, whoever finds it"


def test_draws_use_seed_and_position(passes: list[int]) -> None:
    """A sequence's tokens, one after the other, are those of its seed at 0, 1, 2 ..."""
    case = dataclasses.replace(case_of({"temperature": 0.7}), output=[])
    state, logits = state_of([case], VOCAB), logits_of(1)
    got = [entry(run(state, logits, [0], [0]), 0)[:2] for _ in range(5)]
    for position, (token, logprob) in enumerate(got):
        wanted = reference.sample(
            torch.from_numpy(logits),
            torch.tensor([0.7]),
            torch.tensor([case.seed]),
            torch.tensor([position]),
        )
        assert token == int(wanted[0])
        assert logprob == pytest.approx(float(wanted[1]), abs=1e-5)
    assert len({token for token, _ in got}) > 1


def test_edits_come_first(passes: list[int]) -> None:
    """No end before min_tokens, whatever its logit; penalties as ever."""
    logits = logits_of(1)
    logits[0, EOS] = 50.0
    banned, allowed = case_of({"min_tokens": 4, "seed": 2}), case_of({"min_tokens": 3, "seed": 2})
    assert draw([banned], logits)[0][0] != EOS
    assert draw([allowed], logits)[0][0] == EOS
    logits[0, EOS], logits[0, 4] = 10.0, 12.0
    penalised = case_of({"temperature": 0, "frequency_penalty": 1.5})
    assert draw([penalised], logits)[0][0] == EOS, "12 less twice 1.5"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.nan, "the logits are not finite"),
        (np.inf, "the logits are not finite"),
        (-np.inf, "no token is allowed"),
    ],
)
def test_a_row_without_a_draw_fails_alone(passes: list[int], value: float, reason: str) -> None:
    logits = logits_of(3)
    usual = draw([CASES[0]] * 3, logits)
    logits[1] = value
    got = draw([CASES[0]] * 3, logits)
    assert got[1][3] == reason
    assert [got[0], got[2]] == [usual[0], usual[2]]
    assert all(failed is None for *_, failed in (got[0], got[2]))


def test_a_forced_token_too_large_for_the_temperature(passes: list[int]) -> None:
    """The quotient is infinite; torch draws such a row."""
    logits = logits_of(2)
    logits[0, 17] = 3e38
    got = draw([case_of({"temperature": 0.1})] * 2, logits)
    assert got[0][0] == 17
    assert got[0][1] == 0.0
    assert got[0][3] is None
