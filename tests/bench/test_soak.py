"""The verdict of a soak, on made-up servers: a leak must be seen, and a steady one must pass."""

from __future__ import annotations

import random
from typing import Any

from aserve.bench.soak import KINDS, Sample, imbalance, slope, traffic, verdict


def sample(seconds: float, **values: Any) -> Sample:
    facts = {"rss_mb": 500.0, "files": 20, "threads": 8, "tasks": 9, "unfinished": 0, "received": 0, **values}
    return Sample(seconds=seconds, **facts)


IDLE = (sample(0), sample(1900))


def run(growth: float) -> list[Sample]:
    """Half an hour of samples whose memory grows by ``growth`` MB an hour, with noise."""
    noise = random.Random(0)
    return [sample(s, rss_mb=500 + growth * s / 3600 + noise.uniform(-1, 1)) for s in range(0, 1800, 5)]


def test_a_steady_server_passes() -> None:
    assert verdict(run(0.0), IDLE, 1.0) == []
    assert abs(slope(run(0.0), "rss_mb")) < 1.0


def test_a_leak_is_seen() -> None:
    (wrong,) = verdict(run(60.0), IDLE, 1.0)
    assert wrong.startswith(("memory grows by 6", "memory grows by 59"))


def test_growth_while_it_warms_up_is_no_leak() -> None:
    samples = [sample(s, rss_mb=300 + min(s, 400)) for s in range(0, 1800, 5)]
    assert verdict(samples, IDLE, 1.0) == []


def test_one_step_of_the_heap_is_no_leak_but_a_staircase_is() -> None:
    step = [sample(s, rss_mb=500 + 20 * (s > 1000)) for s in range(0, 1800, 5)]
    assert verdict(step, IDLE, 1.0) == []
    stairs = [sample(s, rss_mb=500 + 10 * (s // 200)) for s in range(0, 1800, 5)]
    assert verdict(stairs, IDLE, 1.0) != []


def test_what_is_left_behind_is_seen() -> None:
    after = sample(1900, files=40, threads=30, tasks=50, unfinished=2)
    wrong = verdict(run(0.0), (IDLE[0], after), 1.0)
    assert [line.split(":")[0].split()[0] for line in wrong] == ["files", "threads", "tasks", "2"]


def test_books_that_do_not_balance() -> None:
    books = {f"aserve:requests_total/{state}": 5.0 for state in ("finished", "aborted", "rejected", "failed")}
    books |= {f"vllm:num_requests_{state}": 1.0 for state in ("running", "waiting", "swapped")}
    assert imbalance({**books, "aserve:requests_total/received": 23.0}) == 0
    assert imbalance({**books, "aserve:requests_total/received": 24.0}) == 1


def test_all_kinds_of_traffic_are_sent() -> None:
    source = random.Random(1)
    found = {traffic(source, "m", 8, KINDS)[0] for _ in range(500)}
    assert found == set(KINDS)
