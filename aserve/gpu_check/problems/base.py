"""What a check of an operation consists of, and how far a result is from what was wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Buffers = Mapping[str, torch.Tensor]
Peer = Callable[[], Any]
"""One call of a library's route to the same result."""


@dataclass(frozen=True)
class Check:
    """One shape of one operation.

    shape: what the operation's family describes it with.
    large: too large for emulated kernels.
    padded: with rows or slots of a captured batch that belong to no request; kernels on CPUs refuse them.
    """

    op: str
    dtype: str
    cache_dtype: str | None
    shape: Any
    large: bool = False
    padded: bool = False

    def __str__(self) -> str:
        types = self.dtype if self.cache_dtype in (None, self.dtype) else f"{self.dtype}/{self.cache_dtype}"
        return f"{self.op} {types} {self.shape}"


@dataclass(frozen=True)
class Want:
    """A value in float64 and how far a result may be off; or, without tolerances, the very bits."""

    value: torch.Tensor
    atol: float | torch.Tensor | None = None
    rtol: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What an operation cannot do without: bytes read and written once, and arithmetic."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Problem:
    """An operation's tensors, its call and its oracle.

    buffers: contiguous tensors by name; outputs hold NaN, or -1 where they hold integers.
    written: names of the buffers it writes.
    arguments: the operation's arguments, views of buffers laid out as ``buffers`` are.
    expected: what each written buffer holds afterwards, from ``buffers`` as they were made.
    peers: by library, given buffers, a call that does the same work.
    """

    buffers: dict[str, torch.Tensor]
    written: tuple[str, ...]
    arguments: Callable[[Buffers], tuple[Any, ...]]
    expected: Callable[[], dict[str, Want]]
    peers: Mapping[str, Callable[[Buffers], Peer]]


@dataclass(frozen=True)
class Operation:
    """make(check, seed, device, changed): a problem; a ``changed`` one has buffers of the same shapes and
    other lengths in them. cost(check): see :class:`Cost`. captured: whether a CUDA graph can hold it.
    """

    make: Callable[[Check, int, str, bool], Problem]
    cost: Callable[[Check], Cost]
    captured: bool = True


def dtype_of(name: str | None) -> torch.dtype:
    found = getattr(torch, name or "", None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype {name!r}")
    return found


def scales_of(dtype: torch.dtype) -> tuple[float, float]:
    """Of the keys and the values in a cache of that type: powers of two, which round nothing."""
    return (0.5, 2.0) if dtype.itemsize == 1 else (1.0, 1.0)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Bytes 0xff: NaN in every float type, -1 in every integer one."""
    made = torch.empty(shape, dtype=dtype, device=device)
    if made.numel():
        made.view(torch.uint8).fill_(255)
    return made


def rounded(
    value: torch.Tensor, dtype: torch.dtype, atol: float | torch.Tensor = 1e-6, tolerance: float = 3e-6
) -> Want:
    """Within the rounding to ``dtype`` of the value; float32 also within what adding up in it costs."""
    return Want(value, atol, tolerance if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def distance(got: torch.Tensor, want: Want) -> float:
    """How far off, in units of what is allowed: at most 1 passes; infinite where a NaN is."""
    if got.shape != want.value.shape:
        return math.inf
    if got.numel() == 0:
        return 0.0
    if want.atol is None:
        return 0.0 if torch.equal(bits(got), bits(want.value)) else math.inf
    wide, value = got.double(), want.value.double()
    off = (wide - value).abs() / (want.atol + want.rtol * value.abs())
    same = (wide == value) | (wide.isnan() & value.isnan())
    return float(off.masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf).max())


def worst(buffers: Buffers, wanted: Mapping[str, Want]) -> tuple[float, str]:
    """The greatest distance among the written buffers, and whose it is."""
    found = [(distance(buffers[name], want), name) for name, want in wanted.items()]
    return max(found)


def random_in(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=random, device=random.device).to(dtype)
