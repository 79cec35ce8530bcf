"""What this device can do at best: the rates that timings are held against."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from aserve.gpu_check.children import Unit
from aserve.gpu_check.machine import Machine
from aserve.gpu_check.options import Options
from aserve.gpu_check.results import Row
from aserve.gpu_check.timing import microseconds

COPY, MATMUL = "copy, bytes/s", "bf16 matmul, flop/s"


def units(options: Options) -> list[Unit]:
    return [
        Unit(COPY, {"kind": "ceiling", "name": COPY}, 30, _copy),
        Unit(MATMUL, {"kind": "ceiling", "name": MATMUL}, 30, _matmul),
    ]


def _copy(machine: Machine) -> Iterator[Row]:
    """Bytes read and written by a copy far larger than the caches."""
    size = 1 << (20 if machine.dry else 30)
    source = torch.zeros(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    taken = microseconds(machine, [lambda: target.copy_(source)], 5)
    yield {"rate": 2 * size / taken * 1e6, "microseconds": taken}


def _matmul(machine: Machine) -> Iterator[Row]:
    size = 64 if machine.dry else 8192
    a, b = (torch.randn(size, size, device=machine.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    taken = microseconds(machine, [lambda: torch.mm(a, b, out=out)], 5)
    yield {"rate": 2 * size**3 / taken * 1e6, "microseconds": taken}
