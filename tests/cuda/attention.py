"""Attention calls on the emulated kernels: from a paged batch to its output."""

from __future__ import annotations

import dataclasses

import torch

from aserve.gpu_check.paging import Batch, Case, make
from tests.cuda.emulator import CODES, AttentionArgs, Emulator, ptr


def quantised(batch: Batch, dtype: torch.dtype, k_scale: float, v_scale: float) -> Batch:
    """The batch with an 8-bit cache; what its keys and values then stand for is what the oracle sees."""
    sides = []
    for side, scale in zip(batch.cache, (k_scale, v_scale), strict=True):
        most = torch.finfo(dtype).max
        sides.append((side.float() / scale).clamp(-most, most).to(dtype))
    kept = []
    for values, scale in ((batch.keys, k_scale), (batch.values, v_scale)):
        most = torch.finfo(dtype).max
        kept.append([(v.float() / scale).clamp(-most, most).to(dtype).double() * scale for v in values])
    return dataclasses.replace(batch, cache=(sides[0], sides[1]), keys=kept[0], values=kept[1])


def batch_of(case: Case, dtype: torch.dtype, cache_dtype: torch.dtype | None = None, seed: int = 0) -> Batch:
    batch = make(case, dtype, seed)
    if cache_dtype is None or cache_dtype == dtype:
        return batch
    return quantised(batch, cache_dtype, 0.05 if cache_dtype == torch.float8_e4m3fn else 1.0, 0.5)


def scales_of(batch: Batch) -> tuple[float, float]:
    return {torch.float8_e4m3fn: (0.05, 0.5), torch.float8_e5m2: (1.0, 0.5)}.get(
        batch.cache[0].dtype, (1.0, 1.0)
    )


def arguments(
    emulator: Emulator, batch: Batch, splits: int = 1, max_query_len: int | None = None
) -> tuple[AttentionArgs, torch.Tensor]:
    """The kernel's arguments, all of them in guarded memory, and the output."""
    case = batch.case
    q = emulator.put(batch.q)
    out = emulator.empty(q.shape, q.dtype)
    k_cache, v_cache = (emulator.put(side) for side in batch.cache)
    slopes = batch.options.get("alibi_slopes")
    tokens, heads, size = q.shape
    partial = emulator.empty((tokens, heads, splits, size + 2), torch.float32) if splits > 1 else None
    k_scale, v_scale = scales_of(batch)
    tables = emulator.put(batch.meta.block_tables)
    args = AttentionArgs(
        q=ptr(q),
        out=ptr(out),
        k_cache=ptr(k_cache),
        v_cache=ptr(v_cache),
        query_start=ptr(emulator.put(batch.meta.query_start)),
        seq_lens=ptr(emulator.put(batch.meta.seq_lens)),
        block_tables=ptr(tables),
        alibi_slopes=ptr(None if slopes is None else emulator.put(slopes)),
        partial=ptr(partial),
        tokens=tokens,
        rows=len(case.rows),
        q_heads=heads,
        kv_heads=case.kv_heads,
        head_size=size,
        q_token=q.stride(0),
        q_head=q.stride(1),
        cache_block=k_cache.stride(0),
        cache_head=k_cache.stride(1),
        cache_slot=k_cache.stride(2),
        block_size=case.block_size,
        table_stride=tables.stride(0),
        max_query_len=max_query_len or max(count for count, _ in case.rows),
        splits=splits,
        window=case.window or 0,
        scale=batch.scale,
        softcap=case.softcap or 0.0,
        k_scale=k_scale,
        v_scale=v_scale,
        dtype=CODES[q.dtype],
        cache_dtype=CODES[k_cache.dtype],
    )
    return args, out


def attend(
    emulator: Emulator, kernel: str, batch: Batch, splits: int = 1, max_query_len: int | None = None
) -> torch.Tensor:
    args, out = arguments(emulator, batch, splits, max_query_len)
    emulator.call(kernel, args)
    return out


def compare(got: torch.Tensor, want: torch.Tensor, kernel: str, values: list[torch.Tensor]) -> None:
    """Off by the rounding of the result; on the tensor cores also by that of the weights to 16 bits."""
    if got.dtype == torch.float32:
        torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=5e-6)
        return
    eps = torch.finfo(got.dtype).eps
    if kernel == "decode_simple":
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0.51 * eps)
        return
    most = max(float(v.abs().max()) for v in values if v.numel())
    # A weight is off by half an eps of itself at most, so a sum of values by half an eps of the greatest.
    torch.testing.assert_close(got.double(), want, atol=0.5 * eps * most + 1e-5, rtol=0.51 * eps)
