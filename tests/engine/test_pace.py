"""How large chunks of prompts are made."""

from __future__ import annotations

import math

import pytest

from aserve.engine.pace import Pace
from aserve.messages.step import StepPlan, StepResult


def plan(*, prompt: int = 0, decodes: int = 0, drawn: int | None = None) -> StepPlan:
    counts = [prompt] * (prompt > 0) + [1] * decodes
    rows = len(counts)
    samples = [(row, row) for row in range(rows if drawn is None else drawn)]
    slots = list(range(rows))
    return StepPlan(0, slots, [0] * rows, counts, samples, num_prefill_rows=int(prompt > 0))


def result(seconds: float, steps: int = 1) -> StepResult:
    return StepResult(0, [], [], steps=steps, seconds=seconds)


def paced(slowdown: float | None) -> Pace:
    """4 ms a prompt token, and 80 ms for 8 decodes, the last thing that was done."""
    pace = Pace(slowdown)
    pace.took(plan(prompt=100), result(0.4))
    pace.took(plan(decodes=8), result(0.16, steps=2))
    pace.issued(plan(decodes=8))
    return pace


def test_chunks_take_what_decodes_leave():
    assert paced(2.0).prompt_tokens() == 20
    assert paced(1.53).prompt_tokens() == 10
    assert paced(1.1).prompt_tokens() == 4, "never less than that"
    assert paced(None).prompt_tokens() == math.inf


@pytest.mark.parametrize(("waiting", "tokens"), [(0, 20), (8, 60), (16, 100)])
def test_those_who_wait_count_as_much_as_those_who_decode(waiting: int, tokens: int):
    pace = paced(2.0)
    assert pace.prompt_tokens(waiting) == pytest.approx(tokens, abs=1)
    pace.issued(plan(decodes=1))
    assert pace.prompt_tokens(waiting) == pytest.approx(20 + 40 * waiting, abs=1)


def test_without_decodes_there_is_nobody_to_slow_down():
    pace = paced(2.0)
    pace.issued(plan(prompt=20, drawn=0))
    assert pace.prompt_tokens() == math.inf
    pace.issued(plan(prompt=20))
    assert pace.prompt_tokens() == 20, "the prompt is complete: it decodes next"


def test_quick_steps_may_take_ten_milliseconds():
    pace = Pace(1.5)
    pace.took(plan(prompt=100), result(0.02))
    pace.took(plan(decodes=1), result(0.002))
    pace.issued(plan(decodes=1))
    assert pace.prompt_tokens() == pytest.approx(40, abs=1)


def test_the_time_of_a_token_is_learned_beside_decodes_too():
    pace = paced(3.0)
    for _ in range(40):
        pace.took(plan(prompt=20, decodes=8), result(0.08 + 20 * 0.002))
    assert pace.prompt_tokens() == pytest.approx(80, abs=2)


def test_nothing_is_held_back_before_anything_was_measured():
    pace = Pace(2.0)
    pace.issued(plan(decodes=3))
    assert pace.prompt_tokens() == math.inf
