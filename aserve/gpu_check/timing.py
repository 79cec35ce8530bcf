"""How long a call takes on the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from aserve.gpu_check.machine import Machine

CALLS = 20
REPEATS = 7


def microseconds(machine: Machine, calls: Sequence[Callable[[], Any]], count: int = CALLS) -> float:
    """Of one call: the median of 7 replays of a graph of ``count`` calls, which take turns.

    RuntimeError: the calls cannot be captured.
    """

    def all_of_them() -> None:
        for at in range(count):
            calls[at % len(calls)]()

    replay = machine.capture(all_of_them)
    replay()
    machine.wait()
    return statistics.median(machine.seconds(replay) for _ in range(REPEATS)) / count * 1e6


def eager_microseconds(machine: Machine, calls: Sequence[Callable[[], Any]], count: int = CALLS) -> float:
    """The same without a graph, for calls that cannot be captured; includes what the host takes."""

    def all_of_them() -> None:
        for at in range(count):
            calls[at % len(calls)]()

    all_of_them()
    machine.wait()
    return statistics.median(machine.seconds(all_of_them) for _ in range(REPEATS)) / count * 1e6
