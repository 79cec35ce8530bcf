"""The shapes of the CUDA kernels through the CPU's own, against float64."""

from __future__ import annotations

from types import ModuleType

import pytest

from aserve.errors import ConfigError
from aserve.gpu_check import cases
from aserve.gpu_check.problems.base import Check, worst
from aserve.ops import native, probe


def served(check: Check) -> bool:
    """By the kernels on CPUs, which have no 8-bit caches, penalise and draw in float32 alone and refuse what
    belongs to no request."""
    narrow = "float8" in (check.cache_dtype or "")
    drawn = check.op in ("penalties", "sample") and check.dtype != "float32"
    return not (check.large or check.padded or narrow or drawn)


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize("check", [check for check in cases.every() if served(check)], ids=str)
def test_case(loaded: ModuleType, level: str, check: Check) -> None:
    try:
        loaded.select(level)
    except ConfigError as error:
        pytest.skip(str(error))
    problem = cases.OPERATIONS[check.op].make(check, 1, "cpu", False)
    wanted = problem.expected()
    getattr(probe.operations(), check.op)(*problem.arguments(problem.buffers))
    off, name = worst(problem.buffers, wanted)
    assert off <= 1, f"{name} is {off} times as far off as it may be"
