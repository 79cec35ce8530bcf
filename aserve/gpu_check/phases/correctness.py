"""Every operation on every shape, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from aserve.gpu_check import cases
from aserve.gpu_check.children import Unit
from aserve.gpu_check.machine import Machine
from aserve.gpu_check.options import Options
from aserve.gpu_check.problems.base import Check, worst
from aserve.gpu_check.results import Row


def units(options: Options) -> list[Unit]:
    every = [check for check in cases.every() if options.wants(check.op)]
    chosen = cases.firsts(every) if options.dry else every
    return [_unit(check, options.seed) for check in chosen]


def _unit(check: Check, seed: int) -> Unit:
    def run(machine: Machine) -> Iterator[Row]:
        yield {**finding(machine, check, seed), "seed": seed}

    return Unit(str(check), about("correctness", check), 30, run)


def about(kind: str, check: Check) -> Row:
    return {
        "kind": kind,
        "op": check.op,
        "dtype": check.dtype,
        "cache_dtype": check.cache_dtype,
        "shape": str(check.shape),
    }


def finding(machine: Machine, check: Check, seed: int) -> Row:
    """Runs a shape: whether it passed, and how far off its worst buffer is in units of what is allowed."""
    problem = cases.OPERATIONS[check.op].make(check, seed, machine.device, False)
    wanted = problem.expected()
    with poisoned_memory():
        getattr(machine.ops, check.op)(*problem.arguments(problem.buffers))
    machine.wait()
    off, name = worst(problem.buffers, wanted)
    return {"passed": off <= 1, "off": round(off, 4) if math.isfinite(off) else None, "buffer": name}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that operations take for themselves holds NaN, too."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
