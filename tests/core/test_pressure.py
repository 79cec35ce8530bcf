"""Swapping, windows, lookahead, priorities, deadlines, full queues; and faults planted in them."""

from __future__ import annotations

import pytest

from aserve.core.block_manager import BlockManager
from aserve.core.issue import PlanIssuer
from aserve.core.sequence import SequenceStatus
from aserve.errors import QueueFullError
from tests.core.driver import Driver

# ------------------------------------------------------------------ swapping


def outputs(num_blocks, *, n=1, overlap=0, length=8, max_tokens=30, **options):
    driver = Driver(num_blocks=num_blocks, overlap=overlap, **options)
    groups = [driver.add(name, length, n=n, max_tokens=max_tokens) for name in ("a", "bb", "ccc")]
    driver.run()
    assert driver.scheduler.blocks.swap_pool.num_free == driver.limits.num_swap_blocks
    return driver, [[seq.output_token_ids for seq in group.seqs] for group in groups], groups


def swaps(driver):
    return sum(len(plan.swap_outs) for plan in driver.plans), sum(len(p.swap_ins) for p in driver.plans)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("caching", [False, True])
def test_swapped_requests_lose_nothing(overlap, chunked, n, caching):
    options = {"n": n, "overlap": overlap, "chunked_prefill": chunked, "prefix_caching": caching}
    _, expected, _ = outputs(64, **options)
    driver, got, groups = outputs(22 if n > 1 else 14, num_swap_blocks=64, preemption_mode="swap", **options)
    assert got == expected
    assert groups[2].num_preemptions > 0
    out, back = swaps(driver)
    assert out == back > 0
    assert not any(plan.swap_outs and plan.swap_ins for plan in driver.plans)
    prompts = sum(plan.num_prefill_rows for plan in driver.plans)
    assert prompts == 3  # nothing was computed twice


def test_what_siblings_share_is_moved_once_and_stays_shared():
    driver = Driver(num_blocks=16, num_swap_blocks=16)
    driver.add("a", 20, max_tokens=60)
    group = driver.add("bb", 10, n=3, max_tokens=20)
    while not driver.scheduler.num_swapped:
        driver.step()
    (plan,) = [plan for plan in driver.plans if plan.swap_outs]
    tables = [seq.swapped_blocks for seq in group.seqs]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len(plan.swap_outs) == len({block for table in tables for block in table})
    assert driver.scheduler.blocks.swap_pool.num_free == 16 - len(plan.swap_outs)
    driver.run()


@pytest.mark.parametrize(
    ("n", "mode", "moved"), [(1, None, False), (2, None, True), (1, "swap", True), (2, "recompute", False)]
)
def test_several_sequences_are_swapped_one_is_recomputed_unless_told_otherwise(n, mode, moved):
    driver, _, groups = outputs(22 if n > 1 else 14, n=n, num_swap_blocks=64, preemption_mode=mode)
    assert groups[2].num_preemptions > 0
    assert (swaps(driver)[0] > 0) == moved


def test_a_full_swap_space_means_recomputation():
    _, expected, _ = outputs(64)
    driver, got, groups = outputs(14, num_swap_blocks=2, preemption_mode="swap")
    assert got == expected
    assert groups[2].num_preemptions > 0 and swaps(driver) == (0, 0)


def test_a_swapped_request_goes_before_those_that_came_later():
    driver = Driver(num_blocks=14, num_swap_blocks=64, preemption_mode="swap")
    for name in ("a", "bb", "ccc"):
        driver.add(name, 8, max_tokens=30)
    while not driver.scheduler.num_swapped:
        driver.step()
    driver.add("dddd", 4)
    started = []
    while driver.scheduler.groups:
        started += [row[0] for row in driver.step() or [] if row[0] not in started]
    assert started.index("ccc") < started.index("dddd")


def test_aborting_a_swapped_request_frees_its_swap_space():
    driver = Driver(num_blocks=14, num_swap_blocks=64, preemption_mode="swap", overlap=1)
    for name in ("a", "bb", "ccc"):
        driver.add(name, 8, max_tokens=30)
    while not driver.scheduler.num_swapped:
        driver.step()
    assert driver.scheduler.abort("ccc") is not None
    driver.scheduler.verify()
    assert driver.scheduler.blocks.swap_pool.num_free == 64 and driver.scheduler.num_swapped == 0
    driver.run()


def test_a_group_alone_that_outgrows_the_cache_makes_room_for_those_who_wait():
    driver = Driver(num_blocks=6)
    group = driver.add("a", 10, n=4, max_tokens=None)
    waiting = driver.add("bb", 10, max_tokens=3)
    driver.run()
    assert {seq.status for seq in group.seqs} == {SequenceStatus.FINISHED_LENGTH}
    assert waiting.seqs[0].num_output_tokens == 3


# ------------------------------------------------------------------ windows


@pytest.mark.parametrize("overlap", [0, 1])
def test_blocks_that_leave_the_window_are_freed(overlap):
    driver = Driver(num_blocks=8, window=9, overlap=overlap)
    group = driver.add("a", 20, max_tokens=100)
    driver.step()
    for _ in range(90):
        driver.step()
        assert driver.used <= 4
    driver.run()
    assert group.seqs[0].num_output_tokens == 100  # far more than eight blocks of four ever held


def test_a_window_of_one_token():
    driver = Driver(window=1, block_size=1)
    driver.add("a", 5, max_tokens=20, n=2)
    driver.run()


def test_a_long_prompt_in_chunks_needs_no_more_than_window_and_chunk():
    driver = Driver(num_blocks=50, window=8, chunked_prefill=True, max_num_batched_tokens=8)
    driver.add("a", 150, max_tokens=1)
    used = []
    while driver.scheduler.groups:
        driver.step()
        used.append(driver.used)
    assert max(used) <= 5


def test_prefix_caching_and_windows_exclude_each_other():
    with pytest.raises(ValueError, match="window"):
        Driver(window=8, prefix_caching=True)


# ------------------------------------------------------------------ lookahead


@pytest.mark.parametrize("slots", [1, 4, 9])
def test_lookahead_slots_are_reserved(slots):
    driver = Driver(num_lookahead_slots=slots)
    driver.add("a", 7, max_tokens=50)
    for computed in range(7, 40):
        driver.step()
        assert driver.used == -(-(computed + slots) // 4)
    driver.run()


def test_lookahead_ends_where_the_sequence_must():
    driver = Driver(num_lookahead_slots=50, num_blocks=5, max_num_batched_tokens=32)
    group = driver.add("a", 10, max_tokens=None, max_model_len=20)
    driver.run()
    assert group.seqs[0].num_output_tokens == 11


def test_forks_do_not_share_lookahead_slots():
    driver = Driver(num_lookahead_slots=6)
    driver.add("a", 8, n=3, max_tokens=20)
    driver.step()
    assert driver.used == 2 + 2  # the prompt's blocks, and the parent's own six slots
    driver.run()


# ------------------------------------------------------------------ who comes first


def test_lower_priorities_run_first_and_equal_ones_by_arrival():
    driver = Driver(max_num_seqs=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 5), ("d", 0), ("e", -3)):
        driver.add(name, 4, max_tokens=1, group_options={"priority": priority})
    order = []
    while driver.scheduler.groups:
        order += [name for name, _ in driver.step() or []]
    assert order == ["e", "b", "d", "a", "c"]


def test_the_highest_priority_number_gives_way_even_if_it_came_first():
    driver = Driver(num_blocks=14)
    for name, priority in (("a", 9), ("bb", 0), ("ccc", 0)):
        driver.add(name, 8, max_tokens=30, group_options={"priority": priority})
    groups = dict(driver.scheduler.groups)
    driver.run()
    assert groups["a"].num_preemptions > 0
    assert groups["bb"].num_preemptions == 0


def test_nobody_overtakes_a_request_that_does_not_fit_yet():
    driver = Driver(num_blocks=12)
    driver.add("a", 20, max_tokens=20)
    driver.step()
    driver.add("big", 40, max_tokens=1)
    driver.add("small", 4, max_tokens=1)
    assert driver.step() == [("a", 1)]
    driver.add("urgent", 4, max_tokens=1, group_options={"priority": -1})
    assert driver.step() == [("urgent", 4)]


# ------------------------------------------------------------------ deadlines and full queues


def test_requests_are_given_up_at_their_deadline():
    driver = Driver()
    late = driver.add("a", 4, max_tokens=100, group_options={"deadline": 5.0})
    waiting = driver.add("b", 4, arrival=99.0, group_options={"deadline": 3.5})
    fine = driver.add("c", 4, max_tokens=3, group_options={"deadline": 1000.0})
    driver.now = 0.0
    driver.scheduler.waiting.remove(waiting)
    driver.scheduler.waiting.push(waiting)
    expired = []
    for _ in range(12):
        driver.step()
        expired += [(group.request_id, driver.now) for group in driver.scheduler.take_expired()]
    assert [name for name, _ in expired] == ["b", "a"]
    assert late.seqs[0].status is waiting.seqs[0].status is SequenceStatus.FINISHED_ABORTED
    assert 0 < late.seqs[0].num_output_tokens < 100
    assert fine.seqs[0].status is SequenceStatus.FINISHED_LENGTH
    assert driver.used == 0


def test_ended_requests_with_late_deadlines_do_not_pile_up():
    driver = Driver()
    for index in range(300):
        driver.add(f"r{index}", 2, max_tokens=1, group_options={"deadline": 1e9})
        driver.run()
    assert len(driver.scheduler._deadlines) <= 256
    assert len(driver.scheduler.waiting._heap) == 0


def test_the_queue_is_bounded_in_requests():
    driver = Driver(max_waiting_requests=3, max_num_seqs=1)
    for name in "abc":
        driver.add(name, 4, max_tokens=2)
    with pytest.raises(QueueFullError, match="3 requests are waiting"):
        driver.add("d", 4)
    driver.step()
    driver.add("e", 4)  # a runs now
    with pytest.raises(QueueFullError):
        driver.scheduler.check_room()
    driver.run()
    ledger = driver.scheduler.ledger
    assert (ledger.received, ledger.finished, ledger.rejected) == (6, 4, 2)


def test_requests_on_their_way_count_as_waiting():
    driver = Driver(max_waiting_requests=3)
    driver.add("a", 4)
    driver.scheduler.check_room(num_coming=1)
    with pytest.raises(QueueFullError):
        driver.scheduler.check_room(num_coming=2)


def test_the_queue_is_bounded_in_prompt_tokens():
    driver = Driver(max_waiting_tokens=30)
    driver.add("a", 50)  # finds nobody waiting
    with pytest.raises(QueueFullError, match="50 prompt tokens are waiting"):
        driver.scheduler.check_room()
    driver.step()
    driver.add("b", 20)
    driver.scheduler.check_room()
    with pytest.raises(QueueFullError):
        driver.add("c", 11)
    driver.add("d", 10)
    driver.run()


def test_the_queue_forgets_who_left_it():
    driver = Driver(max_num_seqs=1)
    driver.add("a", 4, max_tokens=5)
    driver.step()
    for index in range(1000):
        driver.add(f"b{index}", 4)
    for index in range(999):
        driver.scheduler.abort(f"b{index}")
    assert len(driver.scheduler.waiting) == 1
    assert len(driver.scheduler.waiting._heap) < 80
    driver.run()


def test_the_books_balance():
    driver = Driver(max_waiting_requests=6, num_blocks=20)
    driver.add("done", 4, max_tokens=2)
    driver.add("gone", 4)
    driver.add("broken", 4)
    driver.add("too long", 300)
    driver.step()
    driver.scheduler.abort("gone")
    for seq in driver.scheduler.groups["broken"].unfinished:
        driver.scheduler.finish(seq, SequenceStatus.FINISHED_FAILED)
    driver.run()
    ledger = driver.scheduler.ledger
    assert (ledger.received, ledger.finished, ledger.aborted, ledger.failed, ledger.rejected) == (
        4,
        1,
        1,
        1,
        1,
    )
    ledger.aborted = 0
    with pytest.raises(RuntimeError, match="add up"):
        driver.scheduler.verify()


def test_a_leak_is_noticed_when_the_last_request_ends():
    driver = Driver()
    driver.add("a", 4, max_tokens=3)
    driver.step()
    driver.scheduler.blocks.pool.allocate(1)
    with pytest.raises(RuntimeError, match="KV blocks were lost"):
        while driver.scheduler.groups:
            driver.scheduler.commit(*_issue(driver))


def _issue(driver):
    plan = driver.scheduler.schedule(driver.now)
    return plan, driver.worker.run(plan)


# ------------------------------------------------------------------ the tests' own power


def fails(monkeypatch, target, name, replacement, scenario):
    scenario()
    monkeypatch.setattr(target, name, replacement)
    with pytest.raises((AssertionError, RuntimeError)):
        scenario()


def swapping(overlap=1, n=2):
    outputs(22 if n > 1 else 14, n=n, num_swap_blocks=64, preemption_mode="swap", overlap=overlap)


def test_copies_to_swap_space_that_are_never_made_are_caught(monkeypatch):
    original = PlanIssuer.issue

    def issue(self, step, now):
        plan = original(self, step, now)
        plan.swap_outs = []
        return plan

    fails(monkeypatch, PlanIssuer, "issue", issue, swapping)


def test_copies_back_in_the_wrong_order_are_caught(monkeypatch):
    original = BlockManager.swap_in

    def swap_in(self, seqs):
        pairs = original(self, seqs)
        return list(zip([a for a, _ in pairs], [b for _, b in reversed(pairs)], strict=True))

    fails(monkeypatch, BlockManager, "swap_in", swap_in, swapping)


def test_a_window_one_token_too_short_is_caught(monkeypatch):
    def scenario():
        # So few blocks that one given up is another's in the same step.
        driver = Driver(num_blocks=24, window=9, block_size=1, overlap=1)
        for name in ("a", "bb", "ccc", "dddd"):
            driver.add(name, 8, max_tokens=30)
        driver.run()

    original = BlockManager.slide

    def slide(self, seq):
        self.window -= 1
        original(self, seq)
        self.window += 1

    fails(monkeypatch, BlockManager, "slide", slide, scenario)


def test_shared_lookahead_slots_are_caught(monkeypatch):
    def scenario():
        driver = Driver(num_lookahead_slots=6, overlap=1)
        driver.add("a", 8, n=3, max_tokens=20)
        driver.run()

    fails(monkeypatch, BlockManager, "share", lambda self, child: self.pool.share(child.blocks), scenario)
