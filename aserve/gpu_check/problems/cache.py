"""Rotary embedding and what it writes to the paged cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    poisoned,
    random_in,
    rounded,
    scales_of,
)

POSITIONS = 50


@dataclass(frozen=True)
class Step:
    """A step's merged projection. rotary: features of a head that turn. padding: tokens stored nowhere."""

    tokens: int
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    rotary: int = 64
    interleaved: bool = False
    block_size: int = 16
    padding: int = 0

    def __str__(self) -> str:
        extras = "".join(
            [" interleaved" if self.interleaved else "", f" padding{self.padding}" if self.padding else ""]
        )
        size = f"{self.head_size}" if self.rotary == self.head_size else f"{self.rotary}of{self.head_size}"
        return f"{self.tokens} h{self.heads}/{self.kv_heads}x{size} b{self.block_size}{extras}"


def _split(shape: Step, merged: torch.Tensor) -> tuple[torch.Tensor, ...]:
    keys = shape.heads + shape.kv_heads
    return merged[:, : shape.heads], merged[:, shape.heads : keys], merged[:, keys:]


def _rotated(x: torch.Tensor, b: Buffers, interleaved: bool) -> torch.Tensor:
    table = b["cos_sin"].double()[b["positions"]]
    half = table.shape[-1] // 2
    cos, sin = table[:, None, :half], table[:, None, half:]
    first, second = slice(half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    out = x.double().clone()
    a, c = out[..., first].clone(), out[..., second].clone()
    out[..., first], out[..., second] = a * cos - c * sin, c * cos + a * sin
    return out


def _stored(cache: torch.Tensor, slots: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The cache in float64 with the tokens' values in their slots. NaN elsewhere, as it was poisoned."""
    after = cache.double()
    kept = slots >= 0
    block_size = cache.shape[2]
    after[slots[kept] // block_size, :, slots[kept] % block_size] = value[kept].double()
    return after


def _narrowed(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    most = torch.finfo(dtype).max
    return value.float().clamp(-most, most).to(dtype)


def _buffers(check: Check, seed: int, device: str) -> dict[str, torch.Tensor]:
    shape, dtype = check.shape, dtype_of(check.dtype)
    random = torch.Generator(device).manual_seed(seed)
    heads = shape.heads + 2 * shape.kv_heads
    made = {"merged": random_in((shape.tokens, heads, shape.head_size), dtype, random)}
    if check.op != "store_kv":
        angles = torch.rand(POSITIONS, max(shape.rotary // 2, 1), generator=random, device=device) * 7
        made["cos_sin"] = torch.cat([angles.cos(), angles.sin()], -1)
        made["positions"] = torch.randint(0, POSITIONS, (shape.tokens,), generator=random, device=device)
        made["q_out"] = poisoned((shape.tokens, shape.heads, shape.head_size), dtype, device)
    if check.op == "rotary_embedding":
        made["k_out"] = poisoned((shape.tokens, shape.kv_heads, shape.head_size), dtype, device)
        return made
    blocks = -(-shape.tokens // shape.block_size) + 2
    places = torch.randperm(blocks * shape.block_size, generator=random, device=device)
    slots = places[: shape.tokens].clone()
    if shape.padding:
        slots[-shape.padding :] = -1
    made["slots"] = slots
    side = (blocks, shape.kv_heads, shape.block_size, shape.head_size)
    for name in ("k_cache", "v_cache"):
        made[name] = poisoned(side, dtype_of(check.cache_dtype), device)
    return made


def make_rotary(check: Check, seed: int, device: str, changed: bool) -> Problem:
    shape, dtype = check.shape, dtype_of(check.dtype)
    buffers = _buffers(check, seed, device)

    def arguments(b: Buffers) -> tuple[Any, ...]:
        q, k, _ = _split(shape, b["merged"])
        return q, k, b["positions"], b["cos_sin"], shape.interleaved, b["q_out"], b["k_out"]

    def expected() -> dict[str, Want]:
        q, k, _ = _split(shape, buffers["merged"])
        return {
            "q_out": rounded(_rotated(q, buffers, shape.interleaved), dtype),
            "k_out": rounded(_rotated(k, buffers, shape.interleaved), dtype),
        }

    return Problem(buffers, ("q_out", "k_out"), arguments, expected, {"torch": _torch_rotary(shape)})


def make_rope_and_store(check: Check, seed: int, device: str, changed: bool) -> Problem:
    shape, dtype, cached = check.shape, dtype_of(check.dtype), dtype_of(check.cache_dtype)
    buffers = _buffers(check, seed, device)

    def arguments(b: Buffers) -> tuple[Any, ...]:
        q, k, v = _split(shape, b["merged"])
        places = b["positions"], b["cos_sin"], shape.interleaved
        return q, k, v, *places, b["k_cache"], b["v_cache"], b["slots"], *scales_of(cached), b["q_out"]

    def expected() -> dict[str, Want]:
        q, k, v = _split(shape, buffers["merged"])
        slots, turned = buffers["slots"], _rotated(k, buffers, shape.interleaved)
        k_scale, v_scale = scales_of(cached)
        key = rounded(_stored(buffers["k_cache"], slots, turned / k_scale), dtype)
        if cached != dtype:
            # Rounded twice: to the step's type, then to that of the cache, whose small values are coarse.
            info = torch.finfo(cached)
            coarse = 0.51 * info.smallest_normal * info.eps
            key = replace(key, atol=coarse + 2e-6, rtol=key.rtol + 0.51 * info.eps)
        value = _stored(buffers["v_cache"], slots, _narrowed(v.float() / v_scale, cached))
        return {
            "q_out": rounded(_rotated(q, buffers, shape.interleaved), dtype),
            "k_cache": key,
            "v_cache": Want(value, 0.0),
        }

    names = ("q_out", "k_cache", "v_cache")
    return Problem(buffers, names, arguments, expected, {"torch": _torch_rotary(shape, store=True)})


def make_store(check: Check, seed: int, device: str, changed: bool) -> Problem:
    shape, cached = check.shape, dtype_of(check.cache_dtype)
    buffers = _buffers(check, seed, device)

    def arguments(b: Buffers) -> tuple[Any, ...]:
        _, k, v = _split(shape, b["merged"])
        return k, v, b["k_cache"], b["v_cache"], b["slots"], *scales_of(cached)

    def expected() -> dict[str, Want]:
        _, k, v = _split(shape, buffers["merged"])
        wanted = {}
        for name, written, scale in zip(("k_cache", "v_cache"), (k, v), scales_of(cached), strict=True):
            after = buffers[name].clone()
            kept = buffers["slots"] >= 0
            slots, bytes_ = buffers["slots"][kept], after.view(torch.uint8)
            values = bits(_narrowed(written[kept].float() / scale, cached)).view(
                len(slots), shape.kv_heads, -1
            )
            bytes_[slots // shape.block_size, :, slots % shape.block_size] = values
            wanted[name] = Want(after)
        return wanted

    def library(b: Buffers) -> Peer:
        _, k, v = _split(shape, b["merged"])
        return lambda: _torch_store(b, k, v)

    return Problem(buffers, ("k_cache", "v_cache"), arguments, expected, {"torch index_put": library})


def _torch_store(b: Buffers, k: torch.Tensor, v: torch.Tensor) -> None:
    block_size = b["k_cache"].shape[2]
    at = b["slots"] // block_size, b["slots"] % block_size
    scales = scales_of(b["k_cache"].dtype)
    for name, value, scale in zip(("k_cache", "v_cache"), (k, v), scales, strict=True):
        side = b[name]
        # An 8-bit type has no scatter of its own.
        narrow = side.dtype.itemsize == 1
        target = side.view(torch.uint8) if narrow else side
        stored = (value / scale if narrow else value).to(side.dtype)
        target.transpose(1, 2)[at] = stored.view(torch.uint8) if narrow else stored


def _torch_rotary(shape: Step, store: bool = False) -> Any:
    def library(b: Buffers) -> Peer:
        q, k, v = _split(shape, b["merged"])

        def turn(x: torch.Tensor) -> torch.Tensor:
            cos, sin = b["cos_sin"][b["positions"]].unsqueeze(1).chunk(2, -1)
            a, c = x[..., : shape.rotary].float().chunk(2, -1)
            return torch.cat((a * cos - c * sin, c * cos + a * sin), -1).to(x.dtype)

        def call() -> None:
            turn(q)
            key = turn(k)
            if store:
                _torch_store(b, key, v)

        return call

    return library


def _cost(check: Check) -> Cost:
    shape, wide = check.shape, dtype_of(check.dtype).itemsize
    narrow = dtype_of(check.cache_dtype).itemsize if check.cache_dtype else wide
    q, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    if check.op == "rotary_embedding":
        return Cost(shape.tokens * 2 * (q + kv) * wide)
    if check.op == "store_kv":
        return Cost(shape.tokens * 2 * kv * (wide + narrow))
    return Cost(shape.tokens * (2 * q * wide + 2 * kv * (wide + narrow)))


ROTARY_EMBEDDING = Operation(make_rotary, _cost)
ROPE_AND_STORE = Operation(make_rope_and_store, _cost)
STORE_KV = Operation(make_store, _cost)
