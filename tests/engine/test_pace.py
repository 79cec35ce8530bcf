"""How large chunks of prompts are made."""

from __future__ import annotations

import math

import pytest

from aserve.engine.pace import DecodeTimes, Pace
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
    assert paced(2.0).prompt_tokens() == pytest.approx(20, abs=1)
    assert paced(1.53).prompt_tokens() == pytest.approx(10, abs=1)
    assert paced(1.1).prompt_tokens() == 4, "never less than that"
    assert paced(None).prompt_tokens() == math.inf


@pytest.mark.parametrize(("waiting", "tokens"), [(0, 20), (8, 180), (16, 340)])
def test_those_who_wait_count_for_more_than_those_who_decode(waiting: int, tokens: int):
    assert paced(2.0).prompt_tokens(waiting) == pytest.approx(tokens, abs=1)


def test_without_decodes_there_is_nobody_to_slow_down():
    pace = paced(2.0)
    pace.issued(plan(prompt=20, drawn=0))
    assert pace.prompt_tokens() == math.inf
    pace.issued(plan(prompt=20))
    assert pace.prompt_tokens() <= 20, "the prompt is complete: it decodes next"


def test_quick_steps_may_take_ten_milliseconds():
    pace = Pace(1.5)
    pace.took(plan(prompt=100), result(0.02))
    pace.took(plan(decodes=1), result(0.002))
    pace.issued(plan(decodes=1))
    assert pace.prompt_tokens() == pytest.approx(40, abs=1)


def test_nothing_is_held_back_before_anything_was_measured():
    pace = Pace(2.0)
    pace.issued(plan(decodes=3))
    assert pace.prompt_tokens() == math.inf


def true_cost(decodes: int, prompt_tokens: int) -> float:
    return 0.002 * (decodes > 0) + 0.0004 * decodes + 0.0002 * prompt_tokens


def test_a_crowd_whose_decodes_never_ran_alone():
    """Every step has a piece of a prompt and ever more decodes: their time is not taken for the prompt's."""
    pace = Pace(1.7)
    for decodes in (1, 64):
        pace.took(plan(decodes=decodes), result(true_cost(decodes, 0)))
    pace.took(plan(prompt=512), result(true_cost(0, 512)))
    for decodes in range(1, 65):
        pace.issued(plan(decodes=decodes))
        tokens = int(pace.prompt_tokens())
        assert true_cost(decodes, tokens) == pytest.approx(max(1.7 * true_cost(decodes, 0), 0.01), rel=0.05)
        pace.took(plan(prompt=tokens, decodes=decodes), result(true_cost(decodes, tokens)))


def test_a_prompt_that_gets_dearer_gets_smaller_pieces():
    """Later tokens of a long prompt attend to more: decodes beside them are not slowed down for that."""
    pace = Pace(1.7)
    pace.took(plan(decodes=16), result(true_cost(16, 0)))
    pace.took(plan(prompt=512), result(true_cost(0, 512)))
    pace.issued(plan(decodes=16))
    sizes = []
    for piece in range(100):
        sizes.append(int(pace.prompt_tokens()))
        seconds = true_cost(16, 0) + (1 + piece / 20) * 0.0002 * sizes[-1]
        pace.took(plan(prompt=sizes[-1], decodes=16), result(seconds))
        assert seconds < 2.0 * true_cost(16, 0)
    assert sizes[-1] < sizes[0] / 3


def test_what_a_step_takes_for_itself_is_not_taken_for_its_tokens():
    """Else small pieces would look dear, and become smaller still."""
    pace = Pace(1.7)
    pace.took(plan(decodes=16), result(true_cost(16, 0)))
    pace.took(plan(prompt=512), result(true_cost(0, 512)))
    for _ in range(200):
        pace.issued(plan(decodes=16))
        tokens = int(pace.prompt_tokens())
        pace.took(plan(prompt=tokens, decodes=16), result(true_cost(16, tokens) + 0.002))
    assert tokens == pytest.approx((0.01428 - 0.0084 - 0.002) / 0.0002, abs=4)


def test_times_of_decodes():
    times = DecodeTimes()
    assert not times
    times.learn(4, 0.01)
    times.learn(12, 0.03)
    assert [times.of(n) for n in (1, 4, 8, 12, 24)] == pytest.approx([0.01, 0.01, 0.02, 0.03, 0.06])
    for _ in range(50):
        times.learn(4, 0.02)
    assert times.of(4) == pytest.approx(0.02, rel=0.01)
