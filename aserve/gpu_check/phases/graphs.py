"""Each operation captured in a graph, and replayed on other lengths, tables and values."""

from __future__ import annotations

from collections.abc import Iterator

from aserve.gpu_check import cases
from aserve.gpu_check.children import Unit
from aserve.gpu_check.machine import Machine
from aserve.gpu_check.options import Options
from aserve.gpu_check.phases.correctness import about
from aserve.gpu_check.problems.base import Check, bits, worst
from aserve.gpu_check.results import Row


def units(options: Options) -> list[Unit]:
    every = [check for check in cases.every() if options.wants(check.op) and captured(check)]
    if options.dry:
        wanted = [check for check in cases.tiny() if check in every]
    else:
        firsts = set(cases.firsts(every))
        wanted = [check for check in every if check in firsts or check.padded or check.large]
    return [_unit(check, options.seed) for check in wanted]


def captured(check: Check) -> bool:
    """Whether a graph can hold the operation."""
    return cases.OPERATIONS[check.op].captured


def _unit(check: Check, seed: int) -> Unit:
    def run(machine: Machine) -> Iterator[Row]:
        yield finding(machine, check, seed)

    return Unit(str(check), about("graph", check), 30, run)


def finding(machine: Machine, check: Check, seed: int) -> Row:
    """passed: each replay gave the bits of an eager call, and the changed one is right, too."""
    make = cases.OPERATIONS[check.op].make
    call = getattr(machine.ops, check.op)
    first, second = make(check, seed, machine.device, False), make(check, seed + 1, machine.device, True)
    wanted = second.expected()
    held = {name: buffer.clone() for name, buffer in first.buffers.items()}
    replay = machine.capture(lambda: call(*first.arguments(held)))
    same = []
    for problem in (first, second):
        for name, buffer in problem.buffers.items():
            held[name].copy_(buffer)
        replay()
        eager = {name: buffer.clone() for name, buffer in problem.buffers.items()}
        call(*problem.arguments(eager))
        machine.wait()
        same.append(all(bits(held[name]).equal(bits(eager[name])) for name in problem.written))
    off, _ = worst(held, wanted)
    return {"passed": all(same) and off <= 1, "same_as_eager": same[0], "same_after_change": same[1]}
