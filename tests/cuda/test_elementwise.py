"""Norms, activations, rotary embedding, cache writes and block copies on CUDA, against float64."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import pytest
import torch

from tests.cuda.emulator import (
    CODES,
    E4M3,
    CopyArgs,
    Emulator,
    GatedArgs,
    NormArgs,
    RotaryArgs,
    Rows,
    orders,
    ptr,
    rows_of,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 8, 16, 31, 576, 2050, 8200]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def near(got: torch.Tensor, want: torch.Tensor, atol: float = 1e-6) -> None:
    """No more than the rounding of the result away."""
    if got.dtype == torch.float32:
        torch.testing.assert_close(got.double(), want, atol=atol, rtol=3e-6)
    else:
        torch.testing.assert_close(got.double(), want, atol=atol, rtol=0.51 * torch.finfo(got.dtype).eps)


def exact_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def norm(
    emulator: Emulator,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    out = emulator.empty(x.shape, out_dtype or x.dtype)
    total = None if residual is None else emulator.empty(x.shape, x.dtype)
    args = NormArgs(
        x=ptr(x),
        residual=ptr(residual),
        weight=ptr(weight),
        out=ptr(out),
        total=ptr(total),
        x_rows=rows_of(x),
        residual_rows=Rows() if residual is None else rows_of(residual),
        size=x.shape[-1],
        eps=1e-5,
        out_scale=out_scale,
        dtype=CODES[x.dtype],
        weight_dtype=CODES[weight.dtype],
        out_dtype=CODES[out.dtype],
    )
    emulator.call("norm", args)
    return out, total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_norm(emulator: Emulator, size: int, dtype: torch.dtype) -> None:
    x = emulator.put(torch.randn(3, size).to(dtype))
    weights = (
        [torch.randn(size)] if dtype == torch.float32 else [torch.randn(size).to(dtype), torch.randn(size)]
    )
    for (order, seed), weight in zip(orders(), weights, strict=False):
        emulator.order(order, seed)
        held = emulator.put(weight)
        near(norm(emulator, x, held)[0], exact_norm(x, held, 1e-5))


def test_norm_of_heads_in_a_merged_projection(emulator: Emulator) -> None:
    merged = emulator.put(torch.randn(6, 9, 40).bfloat16())
    weight = emulator.put(torch.randn(40).bfloat16())
    for x in (merged[:, 2:7], merged[:, 0], merged[3:4, 1:2], merged[..., 8:24], merged[:, :, 1:]):
        held = weight[: x.shape[-1]]
        near(norm(emulator, x, held)[0], exact_norm(x, held, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_norm_with_residual(emulator: Emulator, size: int, dtype: torch.dtype) -> None:
    x = emulator.put(torch.randn(3, 2 * size).to(dtype))[:, :size]
    residual, weight = emulator.put(torch.randn(3, size).to(dtype)), emulator.put(torch.randn(size).to(dtype))
    for order, seed in orders():
        emulator.order(order, seed)
        out, total = norm(emulator, x, weight, residual)
        assert total is not None
        assert torch.equal(total, x + residual)
        near(out, exact_norm(total, weight, 1e-5))


@pytest.mark.parametrize("size", [57, 576, 2056])
def test_norm_with_an_8_bit_result(emulator: Emulator, size: int) -> None:
    x, weight = emulator.put(torch.randn(5, size).bfloat16()), emulator.put(torch.randn(size).bfloat16())
    out, _ = norm(emulator, x, weight, out_dtype=torch.float8_e4m3fn, out_scale=0.01)
    want = (exact_norm(x, weight, 1e-5) / 0.01).clamp(-448, 448)
    torch.testing.assert_close(out.double(), want, atol=2**-10 * 1.01, rtol=0.0626)
    assert (out.float().abs() == 448).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 8, 576, 2050])
@pytest.mark.parametrize("gated", [1, 0])
def test_activations(emulator: Emulator, size: int, dtype: torch.dtype, gated: int) -> None:
    x = (torch.randn(3, size * (1 + gated)) * 4).to(dtype)
    x[0, 0], x[1, 0], x[2, 0] = -200.0, 200.0, 0.0
    x = emulator.put(x)
    gate = x[:, :size].double()
    up = x[:, size:].double() if gated else 1.0
    wants = [
        torch.nn.functional.silu(gate),
        torch.nn.functional.gelu(gate, approximate="tanh"),
        torch.nn.functional.gelu(gate),
        torch.relu(gate),
    ]
    for activation, want in enumerate(wants):
        out = emulator.empty((3, size), dtype)
        args = GatedArgs(
            x=ptr(x),
            out=ptr(out),
            x_rows=rows_of(x),
            size=size,
            activation=activation,
            gated=gated,
            dtype=CODES[dtype],
        )
        emulator.call("activation", args)
        # 1 + erf and 1 + tanh of a negative gate lose digits.
        near(out, want * up, atol=1e-6 if activation in (0, 3) else 1e-5)


def test_activations_pass_nan_on(emulator: Emulator) -> None:
    x = emulator.put(torch.ones(1, 64))
    x[0, 3] = math.nan
    for activation in range(4):
        out = emulator.empty((1, 32), torch.float32)
        args = GatedArgs(
            x=ptr(x), out=ptr(out), x_rows=rows_of(x), size=32, activation=activation, gated=1, dtype=0
        )
        emulator.call("activation", args)
        assert out.isnan().nonzero().tolist() == [[0, 3]]


def exact_rotation(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    half = cos_sin.shape[1] // 2
    cos, sin = (cos_sin.double()[positions][:, None, part] for part in (slice(half), slice(half, None)))
    pairs = (
        [slice(0, 2 * half, 2), slice(1, 2 * half, 2)]
        if interleaved
        else [slice(half), slice(half, 2 * half)]
    )
    out = x.double().clone()
    a, b = (x.double()[..., part] for part in pairs)
    out[..., pairs[0]], out[..., pairs[1]] = a * cos - b * sin, b * cos + a * sin
    return out


@dataclass
class Rotary:
    """A step's merged projection, and caches filled with 0xff."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    cos_sin: torch.Tensor
    slots: torch.Tensor
    cache: tuple[torch.Tensor, torch.Tensor]


def make_rotary(
    emulator: Emulator,
    head_size: int,
    rotary: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    block_size: int = 16,
    heads: tuple[int, int] = (4, 2),
) -> Rotary:
    q_heads, kv_heads = heads
    merged = emulator.put(torch.randn(5, (q_heads + 2 * kv_heads), head_size).to(dtype))
    shape = (4, kv_heads, block_size, head_size)
    slots = [3 * block_size, 0, 7, 4 * block_size - 1, block_size + 1]
    return Rotary(
        merged[:, :q_heads],
        merged[:, q_heads : q_heads + kv_heads],
        merged[:, q_heads + kv_heads :],
        emulator.put(torch.tensor([3, 0, 49, 1, 2])),
        emulator.put(torch.randn(50, max(rotary, 1))),
        emulator.put(torch.tensor(slots)),
        (emulator.empty(shape, cache_dtype), emulator.empty(shape, cache_dtype)),
    )


def rotate(
    emulator: Emulator,
    r: Rotary,
    rotary: int,
    interleaved: bool,
    store: bool,
    scales: tuple[float, float] = (1.0, 1.0),
    only_store: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    tokens, q_heads, head_size = r.q.shape
    q_out = None if only_store else emulator.empty(r.q.shape, r.q.dtype)
    k_out = None if store else emulator.empty(r.k.shape, r.k.dtype)
    side = r.cache[0]
    args = RotaryArgs(
        q=ptr(r.q),
        k=ptr(r.k),
        v=ptr(r.v if store else None),
        positions=ptr(r.positions),
        cos_sin=ptr(r.cos_sin),
        q_out=ptr(q_out),
        k_out=ptr(k_out),
        k_cache=ptr(side),
        v_cache=ptr(r.cache[1]),
        slots=ptr(r.slots),
        tokens=tokens,
        q_heads=q_heads,
        kv_heads=r.k.shape[1],
        head_size=head_size,
        rotary_size=rotary,
        q_stride=r.q.stride(0),
        k_stride=r.k.stride(0),
        v_stride=r.v.stride(0),
        cache_block=side.stride(0),
        cache_head=side.stride(1),
        cache_slot=side.stride(2),
        block_size=side.shape[2],
        k_scale=scales[0],
        v_scale=scales[1],
        interleaved=int(interleaved),
        dtype=CODES[r.q.dtype],
        cache_dtype=CODES[side.dtype],
    )
    emulator.call("rotary", args)
    return q_out, k_out


ROTARY = [(64, 64), (64, 32), (80, 80), (128, 128), (20, 20), (96, 24), (16, 2), (256, 256)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "rotary"), ROTARY)
def test_rotary(
    emulator: Emulator, head_size: int, rotary: int, dtype: torch.dtype, interleaved: bool
) -> None:
    r = make_rotary(emulator, head_size, rotary, dtype, dtype)
    q_out, k_out = rotate(emulator, r, rotary, interleaved, store=False)
    assert q_out is not None and k_out is not None
    near(q_out, exact_rotation(r.q, r.positions, r.cos_sin, interleaved))
    near(k_out, exact_rotation(r.k, r.positions, r.cos_sin, interleaved))


def check_cache(cache: torch.Tensor, written: torch.Tensor, slots: torch.Tensor, scale: float = 1.0) -> None:
    """The slots hold `written`, and every other byte is as it was."""
    bits = cache.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.dtype.itemsize])
    untouched = torch.ones(bits.shape, dtype=torch.bool)
    block_size = cache.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        at = (slot // block_size, slice(None), slot % block_size)
        untouched[at] = False
        value = written[token].float() / scale
        if cache.dtype.itemsize == 1:
            most = torch.finfo(cache.dtype).max
            value = value.clamp(-most, most)
        assert torch.equal(cache[at].float(), value.to(cache.dtype).float())
    assert (bits[untouched] == (255 if cache.dtype.itemsize == 1 else -1)).all()


@pytest.mark.parametrize("cache_dtype", [*DTYPES, *FP8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_rotary_into_the_cache(
    emulator: Emulator, block_size: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    """The same turned keys as those given out, in their slots; padding tokens are stored nowhere."""
    for interleaved, head_size in ((False, 64), (True, 20), (False, 24)):
        scales = (0.5, 0.25) if cache_dtype.itemsize == 1 else (1.0, 1.0)
        r = make_rotary(emulator, head_size, head_size, dtype, cache_dtype, block_size)
        r.slots[2] = -1
        q_apart, k_apart = rotate(emulator, r, head_size, interleaved, store=False)
        q_out, _ = rotate(emulator, r, head_size, interleaved, store=True, scales=scales)
        assert q_apart is not None and q_out is not None and k_apart is not None
        assert torch.equal(q_out, q_apart)
        check_cache(r.cache[0], k_apart, r.slots, scales[0])
        check_cache(r.cache[1], r.v, r.slots, scales[1])


@pytest.mark.parametrize("order", range(3))
def test_keys_and_values_stored_as_they_are(emulator: Emulator, order: int) -> None:
    emulator.order(order)
    for head_size, heads in ((72, (8, 2)), (128, (4, 4)), (7, (3, 1))):
        r = make_rotary(emulator, head_size, 0, torch.bfloat16, torch.bfloat16, heads=heads)
        rotate(emulator, r, 0, False, store=True, only_store=True)
        check_cache(r.cache[0], r.k, r.slots)
        check_cache(r.cache[1], r.v, r.slots)


def test_an_odd_rotary_size_is_refused(emulator: Emulator) -> None:
    assert emulator.refuses("rotary", RotaryArgs(head_size=64, rotary_size=63))
    assert emulator.refuses("rotary", RotaryArgs(head_size=64, rotary_size=66))
    assert emulator.refuses("norm", NormArgs(size=8, dtype=E4M3))


@pytest.mark.parametrize(("dtype", "head_size"), [(torch.bfloat16, 16), (torch.float32, 5), (torch.uint8, 3)])
def test_copy_blocks(emulator: Emulator, dtype: torch.dtype, head_size: int) -> None:
    """In every layer at once; and between caches of different sizes, as a swap."""
    shape = (6, 2, 8, head_size)
    caches = [emulator.put((torch.randn(shape) * 50).to(dtype)) for _ in range(4)]
    others = [emulator.put((torch.randn(3, *shape[1:]) * 50).to(dtype)) for _ in range(4)]
    before, kept = [c.clone() for c in caches], [c.clone() for c in others]

    def move(source: list[torch.Tensor], target: list[torch.Tensor], pairs: list[tuple[int, int]]) -> None:
        sources, targets = (
            emulator.put(torch.tensor([side.data_ptr() for side in sides])) for sides in (source, target)
        )
        size = source[0].element_size()
        held = emulator.put(torch.tensor(pairs, dtype=torch.int64).view(-1, 2))
        args = CopyArgs(
            sources=ptr(sources),
            targets=ptr(targets),
            pairs=ptr(held),
            sides=len(source),
            count=len(pairs),
            source_stride=source[0].stride(0) * size,
            target_stride=target[0].stride(0) * size,
            block_bytes=source[0][0].numel() * size,
        )
        emulator.call("copy_blocks", args)

    move(caches, caches, [(0, 5), (4, 1), (2, 2)])
    move(caches, others, [(5, 0), (3, 2)])
    move(others, caches, [(1, 3)])
    move(others, caches, [])
    for cache, was, other, had in zip(caches, before, others, kept, strict=True):
        assert torch.equal(other, torch.stack([was[0], had[1], was[3]]))
        assert torch.equal(cache, torch.stack([was[0], was[4], was[2], had[1], was[4], was[0]]))


def test_structures_match_the_header(emulator: Emulator) -> None:
    """Sizes as the compiler lays the arguments out."""
    from tests.cuda import emulator as harness

    for index, name in enumerate(
        ("NormArgs", "GatedArgs", "RotaryArgs", "AttentionArgs", "CopyArgs", "PenaltyArgs", "SampleArgs")
    ):
        assert ctypes.sizeof(getattr(harness, name)) == emulator.lib.show_size(index), name
