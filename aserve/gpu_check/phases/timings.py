"""How long each operation takes, beside a library's route, the device's ceiling and what was expected."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from aserve.gpu_check import cases, timed
from aserve.gpu_check.children import Unit, said
from aserve.gpu_check.machine import Machine
from aserve.gpu_check.options import Options
from aserve.gpu_check.phases import ceilings
from aserve.gpu_check.phases.correctness import about
from aserve.gpu_check.problems.base import Check, Problem
from aserve.gpu_check.results import Row
from aserve.gpu_check.timing import CALLS, eager_microseconds, microseconds

GOAL_BYTES, GOAL_SHARE = 64 << 20, 0.7


def units(options: Options) -> list[Unit]:
    chosen = cases.tiny() if options.dry else timed.TIMED
    return [_unit(check, options) for check in chosen if options.wants(check.op)]


def _unit(check: Check, options: Options) -> Unit:
    def run(machine: Machine) -> Iterator[Row]:
        yield finding(machine, check, options)

    about_it = {**about("timing", check), "name": timed.name_of(check)}
    return Unit(timed.name_of(check), about_it, 40, run)


def finding(machine: Machine, check: Check, options: Options) -> Row:
    operation = cases.OPERATIONS[check.op]
    cost = operation.cost(check)
    # One after the other, so many copies that the caches have lost a copy's data when its turn comes again.
    copies = max(1, min(CALLS, math.ceil(5 * machine.l2 / cost.bytes)))
    problem = operation.make(check, options.seed, machine.device, False)
    held = [problem.buffers] + [
        {name: buffer.clone() for name, buffer in problem.buffers.items()} for _ in range(copies - 1)
    ]
    call = getattr(machine.ops, check.op)
    arguments = [problem.arguments(buffers) for buffers in held]
    measure = microseconds if operation.captured else eager_microseconds
    taken = measure(machine, [_bound(call, each) for each in arguments])
    expected = timed.predicted(check) if options.dry else timed.expectations()[timed.name_of(check)]
    by_bytes = cost.bytes / timed.BYTES_PER_SECOND >= cost.flops / timed.FLOPS
    rate = (cost.bytes if by_bytes else cost.flops) / taken * 1e6
    ceiling = options.ceilings.get(ceilings.COPY if by_bytes else ceilings.MATMUL)
    row: Row = {
        "microseconds": round(taken, 2),
        "bound": "bytes" if by_bytes else "flops",
        "rate": rate,
        "share_of_ceiling": None if ceiling is None else round(rate / ceiling, 4),
        "expected_microseconds": expected,
        "ratio_to_expected": round(taken / expected, 3),
        "peers": _peers(machine, problem, held),
    }
    if check.op == "paged_attention" and by_bytes and cost.bytes >= GOAL_BYTES and ceiling is not None:
        row["goal_met"] = rate / ceiling >= GOAL_SHARE
    return row


def _bound(call: Any, arguments: tuple[Any, ...]) -> Any:
    return lambda: call(*arguments)


def _peers(machine: Machine, problem: Problem, held: list[dict[str, Any]]) -> dict[str, Row]:
    """What the libraries' routes take; where one is missing or refuses, why."""
    found: dict[str, Row] = {}
    for name, make in problem.peers.items():
        try:
            calls = [make(buffers) for buffers in held]
        except (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            found[name] = {"error": said(error)}
            continue
        try:
            found[name] = {"microseconds": round(microseconds(machine, calls), 2)}
        except (RuntimeError, NotImplementedError) as error:
            try:
                taken = eager_microseconds(machine, calls)
                found[name] = {"microseconds": round(taken, 2), "eager": said(error)}
            except (RuntimeError, NotImplementedError) as worse:
                found[name] = {"error": said(worse)}
    return found
