"""Attention over the paged cache."""

from __future__ import annotations

import inspect
import random as stdlib_random
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from aserve.gpu_check import paging
from aserve.gpu_check.problems.base import (
    Buffers,
    Check,
    Cost,
    Operation,
    Peer,
    Problem,
    Want,
    dtype_of,
    poisoned,
    scales_of,
)


def _changed(case: paging.Case, seed: int) -> paging.Case:
    """The case with other lengths: none longer, none shorter than its queries."""
    draw = stdlib_random.Random(seed)
    rows = tuple((count, draw.randint(min(count, length), length)) for count, length in case.rows)
    return replace(case, rows=rows)


def make(check: Check, seed: int, device: str, changed: bool) -> Problem:
    room: paging.Case = check.shape
    case = _changed(room, seed) if changed else room
    dtype, cached = dtype_of(check.dtype), dtype_of(check.cache_dtype)
    batch = paging.make(case, dtype, seed, room, device)
    if cached != dtype:
        batch = paging.narrowed(batch, cached, *scales_of(cached))
    slopes = batch.options.get("alibi_slopes")
    buffers = {
        # Queries lie apart, as in a merged projection.
        "q": _apart(batch.q, room),
        "k_cache": batch.cache[0],
        "v_cache": batch.cache[1],
        "query_start": batch.meta.query_start,
        "seq_lens": batch.meta.seq_lens,
        "block_tables": batch.meta.block_tables,
        "out": poisoned(tuple(batch.q.shape), dtype, device),
    }
    if slopes is not None:
        buffers["alibi_slopes"] = slopes

    def arguments(b: Buffers) -> tuple[Any, ...]:
        return (
            b["q"][:, : room.heads],
            *(b[name] for name in ("k_cache", "v_cache", "query_start", "seq_lens", "block_tables")),
            *(batch.scale, room.window or 0, room.softcap or 0.0, b.get("alibi_slopes")),
            *(*scales_of(cached), max(count for count, _ in room.rows), b["out"]),
        )

    def expected() -> dict[str, Want]:
        value = paging.exact(batch)
        if dtype == torch.float32:
            return {"out": Want(value, 5e-6, 5e-6)}
        eps = torch.finfo(dtype).eps
        greatest = max((float(v.double().abs().max()) for v in batch.values if v.numel()), default=0.0)
        # On the tensor cores a weight is off by half an eps of itself, a sum by half an eps of the greatest.
        return {"out": Want(value, 0.5 * eps * greatest + 1e-5, 0.51 * eps)}

    plain = room.window is None and room.softcap is None and not room.slopes
    lengths = {row for row in case.rows}
    peers: dict[str, Any] = {}
    if plain and cached == dtype and len(lengths) == 1:
        peers["torch SDPA, contiguous keys"] = lambda b: _sdpa(batch, b)
        if all(count == length for count, length in lengths):
            peers["torch varlen_attn"] = lambda b: _varlen(batch, b)
            peers["xformers"] = lambda b: _xformers(batch, b)
    return Problem(buffers, ("out",), arguments, expected, peers)


def _apart(q: torch.Tensor, case: paging.Case) -> torch.Tensor:
    merged = q.new_zeros((q.shape[0], case.heads + 2 * case.kv_heads, case.head_size))
    merged[:, : case.heads] = q
    return merged


def _sdpa(batch: paging.Batch, b: Buffers) -> Peer:
    """Rows of one length as a dense batch whose keys and values were gathered beforehand, once."""
    case = batch.case
    count = case.rows[0][0]
    q = b["q"][:, : case.heads].reshape(len(case.rows), count, case.heads, -1).transpose(1, 2).contiguous()
    k, v = (torch.stack(side).transpose(1, 2).contiguous() for side in (batch.keys, batch.values))
    length = case.rows[0][1]
    if count == 1 or count == length:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=count > 1, enable_gqa=True)
    # Queries at the end of longer sequences: the causal mask is that of the last rows.
    place = torch.arange(length, device=q.device)
    mask = place <= place[length - count :, None]
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _varlen(batch: paging.Batch, b: Buffers) -> Peer:
    from torch.nn.attention.varlen import varlen_attn

    case = batch.case
    # Its arguments differ between versions of torch.
    known = set(inspect.signature(varlen_attn).parameters)
    q = b["q"][:, : case.heads].contiguous()
    copies = 1 if "enable_gqa" in known else case.heads // case.kv_heads
    k, v = (torch.cat(side).repeat_interleave(copies, 1) for side in (batch.keys, batch.values))
    starts, longest = b["query_start"], case.rows[0][0]
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        causal["enable_gqa"] = True
    return lambda: varlen_attn(q, k, v, starts, starts, longest, longest, **causal)


def _xformers(batch: paging.Batch, b: Buffers) -> Peer:
    from xformers.ops import fmha, memory_efficient_attention  # type: ignore[import-not-found]

    case = batch.case
    group = case.heads // case.kv_heads
    q = b["q"][:, : case.heads].reshape(1, -1, case.kv_heads, group, case.head_size)
    k, v = (
        torch.cat(side)[None, :, :, None].expand(-1, -1, -1, group, -1) for side in (batch.keys, batch.values)
    )
    mask = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens([count for count, _ in case.rows])
    return lambda: memory_efficient_attention(q, k, v, attn_bias=mask)


def _cost(check: Check) -> Cost:
    """Queries, outputs, and seen keys and values, once; four operations a pair and feature."""
    case: paging.Case = check.shape
    wide, narrow = dtype_of(check.dtype).itemsize, dtype_of(check.cache_dtype).itemsize
    tokens = pairs = keys = 0
    for count, length in case.rows:
        window = case.window or length
        seen = [min(window, length - count + at + 1) for at in (0, count - 1)] if count else []
        tokens += count
        keys += min(length, window + count - 1) if count else 0
        # An arithmetic series up to the window, constant from there.
        full = max(0, min(count, length - window)) if count else 0
        growing = count - full
        pairs += full * window + (growing * (seen[0] + seen[0] + growing - 1) // 2 if growing else 0)
    moved = 2 * tokens * case.heads * case.head_size * wide
    moved += 2 * keys * case.kv_heads * case.head_size * narrow
    return Cost(moved, 4 * pairs * case.heads * case.head_size)


PAGED_ATTENTION = Operation(make, _cost)
