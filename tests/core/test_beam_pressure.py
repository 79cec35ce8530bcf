"""Many searches in caches that are too small for them: random, with every way a beam can come and go."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from aserve.core.beams import BeamKeeper
from tests.core.driver import Driver
from tests.core.test_beams import add, check

COMMON = [("_go_on", state) for state in ("running", "swapped", "nothing")]
COMMON += [("park", "nothing"), ("_bring_back", "running"), ("_finish", "running")]
RARE = [("_finish", "swapped"), ("_finish", "nothing"), ("_bring_back", "swapped")]


@pytest.fixture
def moves(monkeypatch):
    """How often what was done to a request that ran, was swapped out, or held nothing."""
    counts = Counter()
    for name in ("park", "_bring_back", "_go_on", "_finish"):
        monkeypatch.setattr(BeamKeeper, name, counted(name, getattr(BeamKeeper, name), counts))
    return counts


def counted(name, original, counts):
    def method(self, group, *rest):
        running = any(seq.slot >= 0 for seq in group.seqs)
        counts[name, "running" if running else "swapped" if group.swapped else "nothing"] += 1
        return original(self, group, *rest)

    return method


def scenario(rng):
    limits = {
        "block_size": rng.choice([1, 2, 4]),
        "max_num_seqs": rng.choice([6, 9, 12]),
        "overlap": rng.choice([0, 1, 1, 3]),
        "max_steps": rng.choice([1, 4]),
        "chunked_prefill": rng.random() < 0.6,
        "preemption_mode": rng.choice(["swap", "swap", "recompute", None]),
        "num_swap_blocks": rng.choice([0, 4, 9, 16, 80]),
        "prefix_caching": rng.random() < 0.4,
    }
    if not limits["prefix_caching"] and rng.random() < 0.4:
        limits["window"] = rng.randint(2, 9)
    if limits["chunked_prefill"]:
        # So few that the beams of a request do not always fit into one step.
        limits["max_num_batched_tokens"] = rng.choice([limits["max_num_seqs"], 16])
    # Room for nearly every search alone, and for no two of the larger ones.
    limits["num_blocks"] = rng.choice([48, 56]) // limits["block_size"] + 5
    return limits


@pytest.mark.parametrize(
    ("runs", "wanted"),
    [(300, COMMON), pytest.param(2000, COMMON + RARE, marks=[pytest.mark.slow, pytest.mark.timeout(600)])],
)
def test_random_searches_under_pressure(moves, runs, wanted):
    preemptions = checked = 0
    for seed in range(runs):
        rng = Random(seed)
        driver = Driver(**scenario(rng))
        groups = []
        for number in range(rng.randint(3, 6)):
            name, length = "x" * rng.randint(1, 9) + str(number), rng.randint(1, 13)
            if rng.random() < 0.3:
                driver.add(name, length, max_tokens=24, temperature=0.0)
                continue
            options = {
                "n": 1,
                "best_of": rng.choice([2, 3, 4]),
                "early_stopping": rng.choice([True, False, "never"]),
                "length_penalty": rng.choice([-1.0, 0.0, 1.0, 2.0]),
                "stop_token_ids": rng.choice([[], [9, 30, 31]]),
                "max_tokens": rng.randint(8, 24),
                "eos": rng.choice([5, None]),
            }
            groups.append(add(driver, name, length, **options))
            for _ in range(rng.randint(0, 4)):
                driver.step()
        aborted = rng.choice(groups) if groups and rng.random() < 0.3 else None
        for _ in range(rng.randint(0, 12)):
            driver.step()
        if aborted is not None and driver.scheduler.abort(aborted.request_id) is not None:
            groups.remove(aborted)
        driver.run()
        capped = {seq.group.request_id for seq in driver.scheduler.take_capped()}
        for group in groups:
            if group.request_id not in capped:
                check(group)
                checked += 1
        assert driver.used == 0
        assert driver.scheduler.blocks.swap_pool.num_free == driver.limits.num_swap_blocks
        preemptions += driver.scheduler.num_preemptions
    assert preemptions > runs and checked > 2 * runs
    assert [move for move in wanted if not moves[move]] == [], moves
