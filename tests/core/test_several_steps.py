"""Plans of several greedy steps: who gets them, how many, and what is undone of those not made."""

from __future__ import annotations

import pytest

from aserve.messages.step import StepResult
from tests.core.driver import Driver
from tests.core.memory_worker import expected_output

GREEDY = {"temperature": 0.0}


def decoding(**options):
    """A driver whose request "a" has had its prompt of 6 tokens computed."""
    driver = Driver(max_steps=8, **options)
    group = driver.add("a", 6, max_tokens=30, **GREEDY)
    driver.step()
    return driver, group


def test_a_run_makes_as_many_steps_as_asked():
    driver, group = decoding()
    plan = driver.scheduler.schedule(0.0, 5, 0.25)
    assert (plan.max_steps, plan.seconds) == (5, 0.25)
    assert len(group.seqs[0].blocks) * 4 >= 6 + 5
    assert driver.scheduler.schedule(0.0, 5) is None, "decided although a run is in flight"
    result = driver.worker.run(plan)
    tokens = len(driver.scheduler.commit(plan, result).tokens)
    assert tokens == result.steps
    driver.scheduler.verify()
    assert driver.scheduler.schedule(0.0, 5) is not None


@pytest.mark.parametrize("made", [1, 2, 7])
def test_steps_not_made_are_undone(made):
    driver, group = decoding()
    plan = driver.scheduler.schedule(0.0, 7)
    assert plan.max_steps == 7
    tokens = list(range(20, 20 + made))
    driver.scheduler.commit(plan, StepResult(plan.step_id, tokens, [-1.0] * made, steps=made))
    seq = group.seqs[0]
    assert seq.output_token_ids[1:] == tokens
    assert (seq.num_computed, seq.in_flight, seq.num_known) == (6 + made, 0, 7 + made)
    driver.scheduler.verify()


def test_the_end_of_a_request_bounds_the_run():
    driver = Driver(max_steps=8)
    group = driver.add("a", 6, max_tokens=5, **GREEDY)
    driver.add("b", 6, max_tokens=30, **GREEDY)
    driver.step()
    plan = driver.scheduler.schedule(0.0, 8)
    assert plan.max_steps == 4
    steps = 4
    tokens = [20] * (2 * steps)
    driver.scheduler.commit(plan, StepResult(plan.step_id, tokens, [-1.0] * len(tokens), steps=steps))
    assert group.finished
    driver.scheduler.verify()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"temperature": 0.0, "stop": "x"},
        {"temperature": 0.0, "logprobs": 0},
        {"temperature": 0.0, "min_tokens": 2},
        {"temperature": 0.0, "repetition_penalty": 1.1},
        {"temperature": 0.0, "frequency_penalty": 1.0},
        {"temperature": 0.0, "logit_bias": {3: 1.0}},
        {"temperature": 0.0, "logits_processors": [lambda ids, row: row]},
        {"temperature": 1.0, "n": 2},
    ],
)
def test_whoever_needs_a_look_at_each_token_gets_single_steps_and_so_do_neighbours(options):
    driver, _ = decoding()
    driver.add("bb", 6, max_tokens=30, **options)
    driver.step()
    assert driver.scheduler.schedule(0.0, 8).max_steps == 1


def test_prompts_and_their_chunks_get_single_steps():
    driver, _ = decoding(chunked_prefill=True, max_num_batched_tokens=8)
    driver.add("bb", 15, max_tokens=30, **GREEDY)
    sizes = []
    for _ in range(3):
        plan = driver.scheduler.schedule(0.0, 8)
        sizes.append((max(plan.counts), plan.max_steps))
        driver.scheduler.commit(plan, driver.worker.run(plan))
    # 7 and 7 of the prompt beside a decode, then its last token, which counts as a decode.
    assert [size for size, _ in sizes] == [7, 7, 1]
    assert [steps for _, steps in sizes][:2] == [1, 1]


def test_without_room_for_all_steps_there_is_one():
    driver, _ = decoding(num_blocks=3)
    assert driver.scheduler.blocks.num_free == 1
    assert driver.scheduler.schedule(0.0, 8).max_steps == 1


@pytest.mark.parametrize("steps", [2, 8])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"prefix_caching": True}, {"num_blocks": 12}])
def test_outputs_are_those_of_single_steps(steps, options):
    driver = Driver(max_steps=steps, overlap=1, **options)
    groups = [driver.add(name, 9, max_tokens=17, **GREEDY) for name in ("a", "bb", "ccc")]
    driver.run()
    assert max(plan.max_steps for plan in driver.plans) > 1
    for group in groups:
        seq = group.seqs[0]
        assert seq.output_token_ids == expected_output(group.prompt_token_ids, seq.rng_seed, 17, set())


def test_an_abort_during_a_run_frees_everything():
    driver, _ = decoding()
    plan = driver.scheduler.schedule(0.0, 8)
    result = driver.worker.run(plan)
    driver.scheduler.abort("a")
    assert driver.scheduler.commit(plan, result).tokens == []
    driver.scheduler.verify()
    assert driver.used == 0
