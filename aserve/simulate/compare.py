"""Many simulations: policies against each other, and one policy under rising load."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from aserve.errors import ConfigError
from aserve.simulate import policy, report
from aserve.simulate.device import Profile
from aserve.simulate.trace import INFINITE, Request, TraceSpec, read_trace
from aserve.simulate.virtual import FINISHED, Run, Simulation


@dataclass(frozen=True)
class Scenario:
    """Everything a simulation follows from.

    spec or path: where the requests come from. rate, count: of a file, see ``read_trace``. chosen: policy
    choices by name. goodput: limits in milliseconds.
    """

    profile: Profile
    spec: TraceSpec | None = None
    path: str | None = None
    rate: float | None = None
    count: int | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    concurrency: int | None = None
    goodput: dict[str, float] = field(default_factory=dict)
    percentiles: tuple[float, ...] = report.PERCENTILES

    def requests(self) -> list[Request]:
        if self.spec is not None:
            return self.spec.requests()
        if self.path is None:
            raise ValueError("a scenario needs a trace: spec or path")
        return read_trace(self.path, self.rate, self.count)

    def at_rate(self, rate: float) -> Scenario:
        """The same requests, arriving at another rate."""
        if self.spec is not None:
            return dataclasses.replace(self, spec=dataclasses.replace(self.spec, rate=rate))
        return dataclasses.replace(self, rate=rate)

    def with_choices(self, chosen: dict[str, Any]) -> Scenario:
        return dataclasses.replace(self, chosen=self.chosen | chosen)


def simulate(scenario: Scenario) -> Run:
    """One simulation."""
    limits, serving = policy.resolve(scenario.chosen, scenario.profile)
    simulation = Simulation(scenario.requests(), scenario.profile, limits, serving, scenario.concurrency)
    thresholds = gc.get_threshold()
    # Steps make and drop objects by the thousand, none of them in cycles: looking so often finds nothing.
    gc.set_threshold(100_000, *thresholds[1:])
    try:
        return simulation.execute()
    finally:
        gc.set_threshold(*thresholds)


def summarise(scenario: Scenario) -> dict[str, Any]:
    """One simulation's figures."""
    return report.summary(simulate(scenario), scenario.goodput, scenario.percentiles)


def summarise_all(scenarios: Sequence[Scenario], jobs: int = 1) -> list[dict[str, Any]]:
    """The same for several, ``jobs`` at a time in processes of their own; the order is kept."""
    if jobs <= 1 or len(scenarios) <= 1:
        return [summarise(scenario) for scenario in scenarios]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(scenarios)), mp_context=context) as pool:
        return list(pool.map(summarise, scenarios))


def grid(choices: Sequence[tuple[policy.Option, list[Any]]]) -> list[dict[str, Any]]:
    """Every combination, as choices by name."""
    names = [option.name for option, _ in choices]
    return [
        dict(zip(names, values, strict=True)) for values in itertools.product(*(each for _, each in choices))
    ]


@dataclass(frozen=True)
class Saturation:
    """rates, results: what was simulated, in order of rate. capacity: requests/s while a queue that never
    empties is worked off. rate: the highest that kept ``share`` of requests within the limits; None when
    none did."""

    rates: list[float]
    results: list[dict[str, Any]]
    capacity: float
    rate: float | None


LOADS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.1)
"""Shares of the capacity that a search simulates first."""


def steady_throughput(run: Run) -> float:
    """Requests/s between the end of the first tenth and of the ninth: filling and draining left out.

    ConfigError when too few requests were served to tell.
    """
    ends = sorted(outcome.last for outcome in run.outcomes if outcome.cause == FINISHED and outcome.last)
    first, last = len(ends) // 10, len(ends) * 9 // 10
    if len(ends) < 10 or ends[last] <= ends[first]:
        raise ConfigError(f"{len(ends)} requests served are too few to tell a capacity", param="num_prompts")
    return (last - first) / (ends[last] - ends[first])


def find_saturation(
    scenario: Scenario, *, share: float = 0.9, jobs: int = 1, tolerance: float = 0.02
) -> Saturation:
    """Simulates rising rates, then halves the interval in which ``share`` of requests stops being good.

    The capacity is how fast the middle 80 % of requests end when all are there at once. Without goodput
    limits every request is good and only the capacity says anything; ``rate`` is then None.
    """
    capacity = steady_throughput(simulate(scenario.at_rate(INFINITE)))
    found: dict[float, dict[str, Any]] = {}

    def measure(rates: Sequence[float]) -> None:
        results = summarise_all([scenario.at_rate(rate) for rate in rates], jobs)
        found.update(zip(rates, results, strict=True))

    measure([capacity * load for load in LOADS])
    best: float | None = None
    if scenario.goodput:
        low, high = 0.0, math.inf
        for rate in sorted(found):
            if found[rate]["attainment"] >= share:
                low = rate
            else:
                high = rate
                break
        while high < math.inf and high - low > tolerance * capacity:
            middle = (low + high) / 2
            measure([middle])
            if found[middle]["attainment"] >= share:
                low = middle
            else:
                high = middle
        best = low or None
    rates = sorted(found)
    return Saturation(rates, [found[rate] for rate in rates], capacity, best)
