"""The phases of a run, in order of value, and how the time is shared among them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from aserve.gpu_check import children
from aserve.gpu_check.children import Unit
from aserve.gpu_check.machine import Machine
from aserve.gpu_check.options import Options
from aserve.gpu_check.phases import (
    ceilings,
    correctness,
    end_to_end,
    environment,
    graphs,
    sanitizer,
    timings,
)
from aserve.gpu_check.results import Results

DRY_PATIENCE = 5


@dataclass(frozen=True)
class Phase:
    """share: of the time, in seconds of a run of 540."""

    name: str
    share: float
    units: Callable[[Options], list[Unit]]
    needs: tuple[str, ...] = ()


PHASES = (
    Phase("environment", 15, environment.units),
    Phase("correctness", 105, correctness.units),
    Phase("graphs", 60, graphs.units),
    Phase("ceilings", 15, ceilings.units),
    Phase("timings", 95, timings.units, ("ceilings",)),
    Phase("end_to_end", 170, end_to_end.units, ("ceilings",)),
    Phase("sanitizer", 80, sanitizer.units),
)
NAMES = tuple(phase.name for phase in PHASES)


def chosen(only: tuple[str, ...]) -> list[Phase]:
    """The phases of these names and what they need; all where none is named."""
    if not only:
        return list(PHASES)
    wanted = set(only)
    for phase in PHASES:
        if phase.name in only:
            wanted |= set(phase.needs)
    return [phase for phase in PHASES if phase.name in wanted]


def run(
    phases: list[Phase], options: Options, until: float, opened: Callable[[], Machine], results: Results
) -> list[str]:
    """Runs the phases until that moment of ``time.monotonic``; the names of units that it came too soon for.

    A phase may take its share of the time and what the phases before it left; never the later ones' shares.
    """
    seconds = until - time.monotonic()
    total = sum(phase.share for phase in phases)
    left_out: list[str] = []
    for at, phase in enumerate(phases):
        later = sum(each.share for each in phases[at + 1 :]) / total * seconds
        options = replace(
            options, ceilings={row["name"]: row["rate"] for row in results.of("ceiling") if "rate" in row}
        )
        units = phase.units(options)
        if options.dry:  # on whatever else the machine does
            units = [replace(unit, seconds=DRY_PATIENCE * unit.seconds) for unit in units]
        begun = time.monotonic()
        outcome = children.run(units, opened, until - later, results.put)
        results.put(
            {
                "kind": "phase",
                "name": phase.name,
                "seconds": round(time.monotonic() - begun, 1),
                "units": outcome.ended,
                "left_out": len(outcome.left),
                "first_left_out": outcome.left[:1],
            }
        )
        left_out += [f"{phase.name}: {name}" for name in outcome.left]
    return left_out
