"""The whole list of shapes through the binding and the emulated kernels, against float64."""

from __future__ import annotations

from typing import Any

import pytest

from aserve.gpu_check import cases
from aserve.gpu_check.problems.base import Check, worst
from tests.cuda.emulator import Emulator

EVERY = cases.every()


@pytest.mark.parametrize("check", [check for check in EVERY if not check.large], ids=str)
def test_case(bound: Any, emulator: Emulator, check: Check) -> None:
    problem = cases.OPERATIONS[check.op].make(check, 1, "cpu", False)
    held = {name: emulator.put(buffer) for name, buffer in problem.buffers.items()}
    getattr(bound, check.op)(*problem.arguments(held))
    off, name = worst(held, problem.expected())
    assert off <= 1, f"{name} is {off} times as far off as it may be"


def test_the_list_is_long_and_has_every_combination() -> None:
    assert len([check for check in EVERY if not check.large]) >= 200
    wanted = set(cases.combinations())
    assert {cases.combination(check) for check in EVERY} == wanted
    assert {cases.combination(check) for check in EVERY[: len(wanted)]} == wanted, "first of all one of each"
    assert len({str(check) for check in EVERY}) == len(EVERY), "two shapes of one name"
