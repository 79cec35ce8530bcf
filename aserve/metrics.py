"""Counters, gauges and histograms of one engine, exposed in the Prometheus text format.

A value is a plain attribute and a scrape reads it: nothing is locked and no label is looked up while
the engine runs. All of it therefore belongs to one thread, the one that runs the engine's loop.
Every :class:`Metrics` has a registry of its own, so any number of engines can live in one process,
and there are no ``_created`` series.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counter:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, amount: int = 1) -> None:
        self.value += amount


class Gauge:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        self.value = value


class Histogram:
    """Counts of observations by upper bound (inclusive), and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = list(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """``(upper bound, observations at or below it)``, the last one ``+Inf``."""
        total = 0
        rows = []
        for bound, count in zip([*(str(float(b)) for b in self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


class Labelled:
    """A counter per value of one label, made on first use."""

    def __init__(self, label: str, known: Iterable[str] = ()) -> None:
        self.label = label
        self.children = {value: Counter() for value in known}

    def inc(self, value: str, amount: int = 1) -> None:
        child = self.children.get(value)
        if child is None:
            child = self.children[value] = Counter()
        child.value += amount


T = TypeVar("T", Counter, Gauge, Histogram, Labelled)


def one_two_five(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 ... up to and including ``limit``."""
    bounds = []
    decade = 1
    while decade <= limit:
        bounds += [decade * step for step in (1, 2, 5) if decade * step <= limit]
        decade *= 10
    return bounds


class Metrics(Collector):
    """A set of series that share ``labels``. Declaration order is the order of the output."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._names = list(labels)
        self._values = list(labels.values())
        self._series: list[tuple[str, str, Counter | Gauge | Histogram | Labelled]] = []
        self._info: dict[str, tuple[str, dict[str, str]]] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)  # resident memory, open files, CPU time; on Linux

    def counter(self, name: str, help: str) -> Counter:
        """``name`` ends in ``_total``."""
        return self._add(name, help, Counter())

    def labelled(self, name: str, help: str, label: str, known: Iterable[str] = ()) -> Labelled:
        """A counter split by ``label``; the ``known`` values show 0 from the start."""
        return self._add(name, help, Labelled(label, known))

    def gauge(self, name: str, help: str) -> Gauge:
        return self._add(name, help, Gauge())

    def histogram(self, name: str, help: str, bounds: Sequence[float]) -> Histogram:
        return self._add(name, help, Histogram(bounds))

    def info(self, name: str, help: str, facts: Mapping[str, object]) -> None:
        """A constant 1 whose labels are ``facts`` alone; ``name`` ends in ``_info``. May be repeated."""
        self._info[name] = (help, {key: str(value) for key, value in facts.items()})

    def _add(self, name: str, help: str, series: T) -> T:
        self._series.append((name, help, series))
        return series

    def collect(self) -> Iterable[Metric]:
        for name, (help, facts) in self._info.items():
            yield InfoMetricFamily(name.removesuffix("_info"), help, value=facts)
        for name, help, series in self._series:
            if isinstance(series, Histogram):
                histogram = HistogramMetricFamily(name, help, labels=self._names)
                histogram.add_metric(self._values, buckets=series.cumulative(), sum_value=series.sum)
                yield histogram
            elif isinstance(series, Gauge):
                gauge = GaugeMetricFamily(name, help, labels=self._names)
                gauge.add_metric(self._values, series.value)
                yield gauge
            elif isinstance(series, Counter):
                counter = CounterMetricFamily(name, help, labels=self._names)
                counter.add_metric(self._values, series.value)
                yield counter
            else:
                split = CounterMetricFamily(name, help, labels=[*self._names, series.label])
                for value, child in series.children.items():
                    split.add_metric([*self._values, value], child.value)
                yield split

    def render(self) -> bytes:
        """The whole set in the Prometheus text format 0.0.4."""
        return generate_latest(self._registry)
