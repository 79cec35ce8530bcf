"""Blocks found by their tokens: what is found, what is not, what is given up first, and planted faults."""

from __future__ import annotations

import pytest

from aserve.core.block_manager import BlockManager
from aserve.core.block_pool import BlockPool
from aserve.core.sequence import SequenceStatus
from aserve.messages.inputs import LoRARequest
from tests.core.driver import Driver

TEXT = [i % 50 + 3 for i in range(40)]


def caching(**options) -> Driver:
    return Driver(prefix_caching=True, **options)


def cached(driver: Driver, name: str, prompt: list[int], **options) -> int:
    group = driver.add(name, prompt, **options)
    driver.run()
    assert group.num_cached_tokens is not None
    return group.num_cached_tokens


def test_a_prompt_seen_before_is_computed_from_its_last_block_on():
    driver = caching()
    assert cached(driver, "a", TEXT[:20], max_tokens=1) == 0
    driver.add("b", TEXT[:20], max_tokens=1)
    assert driver.step() == [("b", 4)]  # all of 20 tokens were there, but the last must be computed
    driver.run()
    driver.add("c", [*TEXT[:10], 1, 2, 3], max_tokens=1)
    assert driver.step() == [("c", 5)]
    counts = driver.scheduler.prefix_counts
    assert (counts.queries, counts.hits) == (20 + 20 + 13, 16 + 8)


def test_without_the_option_nothing_is_found():
    driver = Driver()
    cached(driver, "a", TEXT)
    assert cached(driver, "b", TEXT) == 0
    assert (driver.scheduler.prefix_counts.queries, driver.scheduler.prefix_counts.hits) == (0, 0)


@pytest.mark.parametrize("overlap", [0, 1])
def test_the_next_turn_finds_what_was_generated(overlap):
    driver = caching(overlap=overlap)
    group = driver.add("a", TEXT[:10], max_tokens=15, ignore_eos=True)
    driver.run()
    # 10 + 15 tokens, of which the last was drawn and never computed: six full blocks.
    assert cached(driver, "b", [*group.seqs[0].token_ids, 1, 2]) == 24


def test_a_running_neighbour_is_found_while_it_runs():
    driver = caching(chunked_prefill=True, max_num_batched_tokens=16)
    driver.add("a", TEXT[:32])
    assert driver.step() == [("a", 16)]
    driver.add("b", TEXT[:32])
    assert driver.step() == [("a", 16)]
    assert driver.step() == [("b", 4), ("a", 1)]
    assert driver.used == 8 + 2  # seven blocks shared, and a second one for a's ninth
    driver.run()


def test_two_alike_in_one_step_compute_both_and_leave_one_to_find():
    driver = caching()
    driver.add("a", TEXT[:20], max_tokens=2)
    driver.add("b", TEXT[:20], max_tokens=2)
    assert driver.step() == [("a", 20), ("b", 20)]
    driver.run()
    assert len(driver.scheduler.blocks.pool._published) == 5


@pytest.mark.parametrize(
    "other",
    [
        {"cache_salt": "x"},
        {"lora_request": LoRARequest("l", 1, "/l")},
        {"image_hash": b"picture"},
        {"cache_salt": "x", "image_hash": b"picture"},
    ],
    ids=str,
)
def test_salt_adapter_and_image_keep_prompts_apart(other):
    driver = caching()
    assert cached(driver, "a", TEXT) == 0
    assert cached(driver, "b", TEXT, group_options=other) == 0
    assert cached(driver, "c", TEXT, group_options=other) == 36
    assert cached(driver, "d", TEXT) == 36
    assert cached(driver, "e", TEXT, group_options={"cache_salt": "y"}) == 0


def test_parts_of_the_root_cannot_be_confused():
    driver = caching()
    cached(driver, "a", TEXT, group_options={"image_hash": b"1;salt", "cache_salt": "x"})
    assert cached(driver, "b", TEXT, group_options={"image_hash": b"1;saltsalt", "cache_salt": ""}) == 0
    assert cached(driver, "c", TEXT, group_options={"image_hash": b"1;saltsaltx"}) == 0


def test_prompt_logprobs_need_the_whole_prompt():
    driver = caching()
    cached(driver, "a", TEXT)
    group = driver.add("b", TEXT, prompt_logprobs=0)
    assert driver.step() == [("b", 40)]
    driver.run()
    assert len(group.prompt_logprobs) == 39
    assert driver.scheduler.prefix_counts.queries == 40


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_recomputed_request_finds_its_own_blocks(overlap, chunked):
    driver = caching(num_blocks=14, overlap=overlap, chunked_prefill=chunked, preemption_mode="recompute")
    groups = [driver.add(name, 8, max_tokens=30) for name in ("a", "bb", "ccc")]
    driver.run()
    assert groups[2].num_preemptions > 0
    assert groups[2].num_cached_tokens == 0  # what the request found when it came, not what it left itself
    plans = [plan for plan in driver.plans for new in plan.new if new.seq_id == groups[2].seqs[0].seq_id]
    starts = [plan.starts[plan.ticket.rows.index(groups[2].seqs[0])] for plan in plans]
    assert max(starts) > 0


@pytest.mark.parametrize(("first", "expected"), [(2, 4), (1, 8)])
def test_the_least_recently_used_is_given_up_first_and_tails_before_heads(first, expected):
    driver = caching(num_blocks=10)
    for name, token in (("a", 1), ("b", 2), ("c", 1)):
        cached(driver, name, [token] * 12, max_tokens=1)
    assert driver.scheduler.blocks.num_free == 10
    # Seven blocks: four that nothing can find, a's third, which c could not use, and b's last two.
    cached(driver, "d", [9] * 28, max_tokens=1)
    assert cached(driver, "e", [first] * 12, max_tokens=1) == expected


def test_blocks_that_were_found_are_not_evicted_to_make_room_for_the_rest():
    driver = caching(num_blocks=10)
    cached(driver, "a", TEXT[:40], max_tokens=1)
    group = driver.add("b", [*TEXT[:16], *[1] * 24], max_tokens=1)
    assert driver.step() == [("b", 24)]
    assert group.num_cached_tokens == 16


def test_cached_blocks_count_as_free():
    driver = caching(num_blocks=12)
    cached(driver, "a", TEXT, max_tokens=1)
    assert len(driver.scheduler.blocks.pool._published) == 10
    assert driver.scheduler.blocks.pool.usage == 0.0
    driver.add("b", [1] * 48, max_tokens=1)
    assert driver.step() == [("b", 48)]


def test_a_failed_request_leaves_nothing_to_find():
    driver = caching()
    group = driver.add("a", TEXT, max_tokens=50)
    driver.step()
    for seq in group.unfinished:
        driver.scheduler.finish(seq, SequenceStatus.FINISHED_FAILED)
    driver.scheduler.verify()
    assert cached(driver, "b", TEXT) == 0
    assert driver.scheduler.ledger.failed == 1


def test_equal_keys_with_different_tokens_are_told_apart(monkeypatch):
    original = BlockManager._key
    monkeypatch.setattr(BlockManager, "_key", lambda self, seq, i: (b"k%d" % i, original(self, seq, i)[1]))
    driver = caching()
    cached(driver, "a", TEXT)
    assert cached(driver, "b", TEXT[1:]) == 0


def test_keys_differ_between_processes():
    first, second = (caching() for _ in range(2))
    for driver in (first, second):
        cached(driver, "a", TEXT)
    keys = [set(driver.scheduler.blocks.pool._by_key) for driver in (first, second)]
    assert len(keys[0]) > 0 and not keys[0] & keys[1]
    assert all(len(key) == 16 for key in keys[0])


# ------------------------------------------------------------------ the tests' own power


def busy(overlap=1):
    driver = caching(num_blocks=16, overlap=overlap, chunked_prefill=True)
    for turn in range(6):
        for name, length in (("a", 9), ("bb", 6), ("ccc", 14)):
            driver.add(f"{name}{turn}", TEXT[:length], n=2, max_tokens=12)
        for _ in range(4):
            driver.step()
        driver.scheduler.abort(f"bb{turn}")
    driver.run()
    assert driver.scheduler.prefix_counts.hits > 0


def test_the_busy_scenario_is_sound():
    busy(0)
    busy(1)


def test_publishing_before_the_tokens_are_computed_is_caught(monkeypatch):
    def publish(self, seq):
        for index in range(len(seq.token_ids) // self.block_size):
            if index < len(seq.blocks):
                self.pool.publish(seq.blocks[index], *self._key(seq, index))

    monkeypatch.setattr(BlockManager, "publish", publish)
    driver = caching(chunked_prefill=True, max_num_batched_tokens=8, overlap=1)
    driver.add("a", TEXT[:32])
    driver.step()
    driver.scheduler.blocks.grow(driver.scheduler.groups["a"].seqs[0], 32)
    driver.scheduler.blocks.publish(driver.scheduler.groups["a"].seqs[0])
    driver.add("b", TEXT[:32])
    with pytest.raises((AssertionError, RuntimeError)):
        driver.scheduler.abort("a")
        driver.run()


def test_content_that_is_not_compared_is_caught(monkeypatch):
    original = BlockManager._key
    monkeypatch.setattr(BlockManager, "_key", lambda self, seq, i: (b"k%d" % i, original(self, seq, i)[1]))
    monkeypatch.setattr(BlockPool, "find", lambda self, key, content: self._by_key.get(key))
    driver = caching()
    cached(driver, "a", TEXT)
    with pytest.raises(AssertionError, match="foreign data"):
        cached(driver, "b", TEXT[1:])


def test_an_evicted_block_that_stays_in_the_index_is_caught(monkeypatch):
    def evict(self, count):
        for _ in range(count):
            self._free.append(self._kept.popitem(last=False)[0])

    monkeypatch.setattr(BlockPool, "_evict", evict)
    with pytest.raises((AssertionError, RuntimeError, KeyError)):
        busy()


def test_a_prefix_key_without_its_past_is_caught(monkeypatch):
    original = BlockManager._key

    def key(self, seq, index):
        content = original(self, seq, index)[1]
        return content[:16].ljust(16), content

    monkeypatch.setattr(BlockManager, "_key", key)
    driver = caching()
    cached(driver, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    with pytest.raises(AssertionError, match="foreign data"):
        cached(driver, "b", [5, 6, 7, 8, 1, 2, 3, 4, 9])
