"""The scheduler's policies, step by step; and faults the remembering worker must notice."""

from __future__ import annotations

import pytest

from aserve.core.block_manager import BlockManager, Growth
from aserve.core.block_pool import BlockPool
from aserve.core.sequence import SequenceStatus
from tests.core.driver import Driver

# ------------------------------------------------------------------ prompts first


def test_a_step_is_all_prompts_or_all_decodes():
    driver = Driver()
    driver.add("a", 10)
    driver.add("b", 5)
    assert driver.step() == [("a", 10), ("b", 5)]
    assert driver.step() == [("a", 1), ("b", 1)]
    driver.add("c", 7)
    assert driver.step() == [("c", 7)]
    assert driver.step() == [("a", 1), ("b", 1), ("c", 1)]


def test_a_prompt_waits_when_the_token_budget_is_spent_and_nobody_overtakes():
    driver = Driver(max_num_batched_tokens=20)
    driver.add("a", 15)
    driver.add("b", 10)
    driver.add("c", 2)
    assert driver.step() == [("a", 15)]
    assert driver.step() == [("b", 10), ("c", 2)]


def test_max_num_seqs_counts_best_of():
    driver = Driver(max_num_seqs=5)
    driver.add("a", 4, n=3)
    driver.add("b", 4, n=3)
    driver.add("c", 4)
    assert driver.step() == [("a", 4)]
    assert len(driver.scheduler.groups["a"].seqs) == 3
    assert driver.step() == [("a", 1)] * 3


def test_admission_leaves_a_watermark_free_while_something_runs():
    driver = Driver(num_blocks=200, block_size=1, max_num_batched_tokens=200)
    driver.add("a", 100)
    assert driver.step() == [("a", 100)]
    driver.add("b", 99)
    assert driver.step() == [("a", 1)]  # 99 of 100 free blocks would leave fewer than 1 % of 200
    driver.scheduler.abort("a")
    assert driver.step() == [("b", 99)]


@pytest.mark.parametrize(
    ("options", "length"),
    [({}, 201), ({"max_num_batched_tokens": 30}, 31), ({"num_blocks": 4}, 17)],
)
def test_a_prompt_that_never_fits_is_ignored(options, length):
    driver = Driver(**options)
    group = driver.add("a", length)
    assert not driver.accepted
    assert group.seqs[0].status is SequenceStatus.FINISHED_IGNORED
    assert group.seqs[0].finish_reason == "length"
    assert not driver.scheduler.groups and driver.step() is None


def test_the_delay_factor_holds_prompts_back_while_something_runs():
    driver = Driver(delay_factor=2.0)
    driver.add("a", 4, max_tokens=50)
    driver.step(duration=3.0)  # a prompt step of 3 s: later prompts wait 6 s
    driver.add("b", 4)
    seen = [driver.step() for _ in range(8)]
    assert seen[:7] == [[("a", 1)]] * 7
    assert seen[7] == [("b", 4)]


# ------------------------------------------------------------------ chunks


def test_chunked_prefill_example():
    """Two prompts of 60 tokens under a budget of 64, and a third that comes later."""
    driver = Driver(chunked_prefill=True)
    driver.add("a", 60)
    driver.add("b", 60)
    assert driver.step() == [("a", 60), ("b", 4)]
    driver.add("c", 60)
    assert driver.step() == [("b", 56), ("c", 7), ("a", 1)]
    assert driver.step() == [("c", 53), ("a", 1), ("b", 1)]


def test_a_chunk_that_leaves_prompt_tokens_draws_nothing():
    driver = Driver(chunked_prefill=True, max_num_batched_tokens=8)
    driver.add("a", 20)
    assert [driver.step() for _ in range(3)] == [[("a", 8)], [("a", 8)], [("a", 4)]]
    assert driver.scheduler.groups["a"].seqs[0].num_output_tokens == 1


# ------------------------------------------------------------------ pressure


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_latest_arrival_gives_way_and_loses_no_token(overlap, chunked):
    def outputs(num_blocks):
        driver = Driver(num_blocks=num_blocks, overlap=overlap, chunked_prefill=chunked)
        groups = [driver.add(name, 8, max_tokens=30) for name in ("a", "bb", "ccc")]
        driver.run()
        return driver, [group.seqs[0].output_token_ids for group in groups], groups

    _, expected, _ = outputs(64)
    driver, got, groups = outputs(14)
    assert got == expected
    assert groups[0].num_preemptions == 0 < groups[2].num_preemptions
    assert driver.scheduler.blocks.num_free == 14


def test_a_sequence_that_outgrows_the_whole_cache_ends_with_length():
    driver = Driver(num_blocks=5)
    group = driver.add("a", 10, max_tokens=None)
    driver.run()
    assert group.seqs[0].status is SequenceStatus.FINISHED_LENGTH
    assert len(group.seqs[0].token_ids) in (20, 21)
    assert driver.scheduler.take_capped() == group.seqs


def test_siblings_share_the_prompt_and_split_its_last_block():
    driver = Driver()
    group = driver.add("a", 10, n=4)
    driver.step()
    used = driver.limits.num_blocks - driver.scheduler.blocks.num_free
    assert used == 3  # ten tokens in blocks of four, shared by all
    driver.step()
    used = driver.limits.num_blocks - driver.scheduler.blocks.num_free
    assert used == 2 + 4
    driver.run()
    assert len({tuple(seq.output_token_ids) for seq in group.seqs}) == 4


# ------------------------------------------------------------------ the tests' own power


def _busy(overlap=1):
    driver = Driver(num_blocks=16, overlap=overlap)
    for name, length in (("a", 9), ("bb", 6), ("ccc", 11)):
        driver.add(name, length, n=2, max_tokens=12)
    driver.run()


def test_the_busy_scenario_is_sound():
    _busy()


def test_a_missing_copy_on_write_is_caught(monkeypatch):
    monkeypatch.setattr(BlockManager, "_shared_tail", lambda self, seq: None)
    with pytest.raises((AssertionError, RuntimeError)):
        _busy()


def test_a_copy_in_the_wrong_direction_is_caught(monkeypatch):
    original = BlockManager.grow

    def grow(self, seq, num_tokens):
        growth = original(self, seq, num_tokens)
        if growth.split:
            index, source, copy = growth.split
            growth = Growth(growth.taken, (index, copy, source))
        return growth

    monkeypatch.setattr(BlockManager, "grow", grow)
    with pytest.raises((AssertionError, RuntimeError)):
        _busy()


def test_a_block_freed_too_early_is_caught(monkeypatch):
    original = BlockPool.share
    monkeypatch.setattr(BlockPool, "share", lambda self, blocks: original(self, blocks[:-1]))
    with pytest.raises((AssertionError, RuntimeError)):
        _busy()


def test_a_leaked_block_is_caught(monkeypatch):
    original = BlockPool.release
    monkeypatch.setattr(BlockPool, "release", lambda self, blocks: original(self, blocks[1:]))
    with pytest.raises((AssertionError, RuntimeError)):
        _busy()


def test_prompt_tokens_of_a_step_can_be_bounded():
    driver = Driver(chunked_prefill=True, max_num_batched_tokens=32)
    driver.add("a", 4, max_tokens=20)
    driver.step()
    driver.add("bb", 20)
    driver.add("ccc", 9)
    rows = []
    for _ in range(3):
        plan = driver.scheduler.schedule(0.0, prompt_tokens=8)
        rows.append([(seq.group.request_id, n) for seq, n in zip(plan.ticket.rows, plan.counts, strict=True)])
        driver.scheduler.commit(plan, driver.worker.run(plan))
        driver.scheduler.verify()
    assert rows == [
        [("bb", 8), ("a", 1)],
        [("bb", 8), ("a", 1)],
        [("bb", 4), ("ccc", 4), ("a", 1)],
    ]


def test_freed_blocks_are_used_again_before_fresh_ones():
    pool = BlockPool(100)
    for _ in range(30):
        blocks = pool.allocate(7)
        assert max(blocks) < 7
        pool.release(blocks)
