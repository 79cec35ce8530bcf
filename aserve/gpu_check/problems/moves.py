"""Whole blocks copied inside a cache, and between it and host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from aserve.gpu_check.problems.base import (
    Buffers,
    Check,
    Cost,
    Operation,
    Peer,
    Problem,
    Want,
    bits,
    dtype_of,
)


@dataclass(frozen=True)
class Blocks:
    """pairs: blocks moved. host: blocks of the cache in host memory, 0 for copies inside one."""

    pairs: int
    layers: int = 2
    blocks: int = 12
    heads: int = 2
    block_size: int = 16
    head_size: int = 64
    host: int = 0
    back: bool = False

    def __str__(self) -> str:
        where = f" {'from' if self.back else 'to'} host {self.host}" if self.host else ""
        sizes = f"{self.heads}x{self.head_size} b{self.block_size}"
        return f"{self.pairs} of {self.blocks} {sizes} x{self.layers}{where}"


def _names(prefix: str, shape: Blocks) -> list[str]:
    return [f"{prefix}{side}" for side in range(2 * shape.layers)]


def _filled(count: int, check: Check, random: torch.Generator, device: str) -> torch.Tensor:
    """Random bytes: a copy may not even change a NaN."""
    shape: Blocks = check.shape
    dtype = dtype_of(check.cache_dtype)
    size = (count, shape.heads, shape.block_size, shape.head_size * dtype.itemsize)
    filled = torch.randint(0, 256, size, generator=random, dtype=torch.uint8)
    return filled.view(dtype).to(device)


def _moved(
    target: torch.Tensor, source: torch.Tensor, pairs: list[tuple[int, int]], check: Check
) -> torch.Tensor:
    """One pair after the other."""
    shape: Blocks = check.shape
    after = bits(target.cpu()).reshape(len(target), -1).clone()
    read = after if target is source else bits(source.cpu()).reshape(len(source), -1)
    for begin, end in pairs:
        after[end] = read[begin]
    return (
        after.view(target.dtype)
        .view(len(target), shape.heads, shape.block_size, shape.head_size)
        .to(target.device)
    )


def make_copy(check: Check, seed: int, device: str, changed: bool) -> Problem:
    shape: Blocks = check.shape
    random = torch.Generator().manual_seed(seed)
    names = _names("cache", shape)
    buffers = {name: _filled(shape.blocks, check, random, device) for name in names}
    # Chains too: a block read after it was written, and written after it was read.
    pairs = torch.randint(0, shape.blocks, (shape.pairs, 2), generator=random)

    def arguments(b: Buffers) -> tuple[Any, ...]:
        return [b[name] for name in names], pairs

    def expected() -> dict[str, Want]:
        order = [(int(source), int(target)) for source, target in pairs]
        return {name: Want(_moved(buffers[name], buffers[name], order, check)) for name in names}

    def library(b: Buffers) -> Peer:
        source, target = (pairs[:, side].to(device) for side in (0, 1))
        sides = [bits(b[name]).view(shape.blocks, -1) for name in names]

        def call() -> None:
            for side in sides:
                side[target] = side[source]

        return call

    return Problem(buffers, tuple(names), arguments, expected, {"torch index": library})


def make_swap(check: Check, seed: int, device: str, changed: bool) -> Problem:
    shape: Blocks = check.shape
    random = torch.Generator().manual_seed(seed)
    inside, outside = _names("device", shape), _names("host", shape)
    buffers = {name: _filled(shape.blocks, check, random, device) for name in inside}
    for name in outside:
        side = _filled(shape.host, check, random, "cpu")
        buffers[name] = side.pin_memory() if device != "cpu" else side
    sources, targets = (outside, inside) if shape.back else (inside, outside)
    counts = (shape.host, shape.blocks) if shape.back else (shape.blocks, shape.host)
    pairs = torch.stack(
        [torch.randperm(count, generator=random)[: shape.pairs] for count in counts], 1
    ).contiguous()

    def arguments(b: Buffers) -> tuple[Any, ...]:
        return [b[name] for name in sources], [b[name] for name in targets], pairs

    def expected() -> dict[str, Want]:
        order = [(int(source), int(target)) for source, target in pairs]
        return {
            to: Want(_moved(buffers[to], buffers[source], order, check))
            for source, to in zip(sources, targets, strict=True)
        }

    return Problem(buffers, tuple(targets), arguments, expected, {})


def _cost(check: Check) -> Cost:
    shape: Blocks = check.shape
    block = shape.heads * shape.block_size * shape.head_size * dtype_of(check.cache_dtype).itemsize
    return Cost(2 * shape.pairs * 2 * shape.layers * block)


COPY_BLOCKS = Operation(make_copy, _cost, captured=False)
SWAP_BLOCKS = Operation(make_swap, _cost, captured=False)
