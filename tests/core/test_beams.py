"""Beams as sequences: results, blocks and slots under every policy."""

from __future__ import annotations

import pytest

from aserve.core.sequence import SequenceStatus
from aserve.messages.step import StepResult
from tests.core.driver import Driver
from tests.core.memory_worker import VOCAB, expected_beams, expected_output

EOS = 5
BEAM = {"use_beam_search": True, "temperature": 0.0}


def add(driver, name, prompt, *, eos=EOS, **params):
    options = {"n": 4, "best_of": 4, "max_tokens": 12, **BEAM, **params}
    return driver.add(name, prompt, group_options={"eos_token_id": eos}, **options)


def check(group, **options):
    params = group.params
    stop = {*params.stop_token_ids, group.eos_token_id}
    expected = expected_beams(
        group.prompt_token_ids,
        group.width,
        params.max_tokens,
        stop,
        params.length_penalty,
        params.early_stopping,
    )
    assert [(seq.output_token_ids, seq.cumulative_logprob) for seq in group.seqs] == expected
    for index, seq in enumerate(group.seqs):
        assert (seq.index, seq.blocks, seq.slot) == (index, [], -1)
        last = seq.token_ids[-1]
        if last in stop:
            assert seq.status is SequenceStatus.FINISHED_STOPPED
            assert seq.stop_reason == (None if last == group.eos_token_id else last)
        else:
            assert seq.status is SequenceStatus.FINISHED_LENGTH
            assert seq.num_output_tokens == params.max_tokens


POLICIES = {
    "plain": {},
    "overlap": {"overlap": 1},
    "blocks of one": {"block_size": 1, "num_blocks": 200},
    "small budget": {"max_num_batched_tokens": 17, "chunked_prefill": True, "overlap": 1},
    "one token a step": {"max_num_batched_tokens": 8, "chunked_prefill": True, "max_num_seqs": 8},
    "caching": {"prefix_caching": True, "overlap": 1},
    "swap": {"num_blocks": 16, "num_swap_blocks": 60, "preemption_mode": "swap", "overlap": 1},
    "swap of the beams alone": {"num_blocks": 16, "num_swap_blocks": 60},
    "recompute": {"num_blocks": 16, "preemption_mode": "recompute", "overlap": 1},
    "recompute caching": {
        "num_blocks": 16,
        "preemption_mode": "recompute",
        "prefix_caching": True,
        "chunked_prefill": True,
        "max_num_batched_tokens": 9,
    },
    "too little swap space": {
        "num_blocks": 16,
        "num_swap_blocks": 4,
        "preemption_mode": "swap",
        "overlap": 1,
    },
    "lookahead": {"num_lookahead_slots": 3, "overlap": 1, "num_blocks": 80},
    "window": {"window": 5, "num_blocks": 11, "preemption_mode": "recompute", "overlap": 1},
    "window swap": {"window": 5, "num_blocks": 11, "num_swap_blocks": 60, "overlap": 1},
    "several steps": {"max_steps": 8, "overlap": 1},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_beams_under_every_policy(policy):
    driver = Driver(**POLICIES[policy])
    others = [driver.add(f"o{i}", 9, max_tokens=20, temperature=0.0) for i in range(2)]
    beams = [
        add(driver, "aaa", 13),
        add(driver, "bb", 6, n=1, best_of=2, length_penalty=2.0, early_stopping="never"),
        add(driver, "c", 7, best_of=4, early_stopping=True, stop_token_ids=[9, 30]),
    ]
    others.append(driver.add("oo", 9, max_tokens=20, temperature=0.0))
    driver.run()
    for group in beams:
        check(group)
    for group in others:
        seq = group.seqs[0]
        assert seq.output_token_ids == expected_output(group.prompt_token_ids, seq.rng_seed, 20, set())
    assert driver.used == 0
    assert (driver.scheduler.num_preemptions > 0) == (driver.limits.num_blocks < 20)
    assert any(plan.forks for plan in driver.plans)
    assert any(plan.block_copies for plan in driver.plans) == (driver.limits.block_size > 1)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("width", [2, 3, 8])
def test_every_mode(width, length_penalty, early_stopping):
    driver = Driver(num_blocks=200)
    groups = []
    for name in ("a", "bb"):
        groups.append(
            add(
                driver,
                name,
                5,
                n=width,
                best_of=width,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                stop_token_ids=list(range(20, 26)),
            )
        )
        driver.run()
    for group in groups:
        check(group)


def test_others_are_scheduled_ahead_of_their_results_and_beams_are_not():
    driver = Driver(overlap=1)
    add(driver, "b", 5)
    driver.add("o", 5, max_tokens=30)
    rows = [driver.step() for _ in range(9)]
    assert all(any(name == "o" for name, _ in row) for row in rows)
    with_beams = [any(name == "b" for name, _ in row) for row in rows]
    assert with_beams == [True, False] * 4 + [True]


def test_blocks_are_shared_until_they_are_written_to():
    driver = Driver(block_size=4)
    group = add(driver, "a", 9)
    driver.step()
    assert [len(seq.blocks) for seq in group.seqs] == [3] * 4
    assert driver.used == 3 and len({seq.slot for seq in group.seqs}) == 4
    driver.step()
    assert driver.used <= 2 + 4


def test_an_aborted_search_leaves_nothing():
    for steps in range(6):
        driver = Driver(overlap=1)
        group = add(driver, "a", 9)
        for _ in range(steps):
            driver.step()
        driver.scheduler.abort("a")
        assert group.finished
        while driver.issued:
            driver.step()
        assert driver.used == 0 and driver.scheduler.ledger.aborted == 1


def test_an_aborted_search_leaves_nothing_while_its_beams_come_back():
    driver = Driver(num_blocks=16, preemption_mode="recompute")
    driver.add("o", 9, max_tokens=30, arrival=0.0)
    group = add(driver, "aaa", 13)
    for _ in range(100):
        driver.step()
        if group.beam.parked and group.seqs[0].slot >= 0:
            break
    assert group.beam.parked
    driver.scheduler.abort("aaa")
    driver.run()
    assert driver.used == 0


def test_a_failed_row_fails_its_request_alone():
    driver = Driver()
    group, other = add(driver, "a", 9), add(driver, "b", 9)
    driver.step()
    plan = driver.scheduler.schedule(driver.now)
    result = driver.worker.run(plan)
    bad = plan.ticket.beams.index(group.seqs[2])
    changes = driver.scheduler.commit(
        plan, StepResult(plan.step_id, result.token_ids, result.logprobs, result.details, failed={bad: "ill"})
    )
    assert changes.failed == [(group, "ill")]
    assert driver.scheduler.ledger.failed == 1
    driver.run()
    check(other)


@pytest.mark.parametrize("num_blocks", [4, 5, 6])
def test_a_search_too_large_for_the_cache_ends_with_what_it_has(num_blocks):
    driver = Driver(num_blocks=num_blocks, overlap=1)
    group = add(driver, "a", 9, max_tokens=60, eos=None)
    driver.run()
    assert driver.scheduler.take_capped() == [group.seqs[0]]
    lengths = {seq.num_output_tokens for seq in group.seqs}
    assert len(lengths) == 1 and 0 < lengths.pop() < 60
    (length,) = {seq.num_output_tokens for seq in group.seqs}
    expected = expected_beams(group.prompt_token_ids, 4, length, set())
    assert [(seq.output_token_ids, seq.cumulative_logprob) for seq in group.seqs] == expected
    assert driver.used == 0


def test_min_tokens_keep_everything_going():
    driver = Driver()
    # The worker here does not mask: what would end does not.
    group = add(driver, "a", 9, max_tokens=8, min_tokens=8, stop_token_ids=list(range(VOCAB // 4)))
    driver.run()
    expected = expected_beams(group.prompt_token_ids, 4, 8, set())
    assert [seq.output_token_ids for seq in group.seqs] == [tokens for tokens, _ in expected]


def test_the_length_of_the_model_ends_a_search():
    driver = Driver()
    group = driver.add("a", 9, max_model_len=14, n=3, **BEAM, max_tokens=None)
    driver.run()
    expected = expected_beams(group.prompt_token_ids, 3, 6, set())
    assert [seq.output_token_ids for seq in group.seqs] == [tokens for tokens, _ in expected]
