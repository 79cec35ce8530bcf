"""The decode route whose shapes are fixed and that reads nothing on the host."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from aserve.attention.base import AttentionMetadata
from aserve.attention.decode import decode
from aserve.gpu_check.paging import Batch, Case, exact, make, narrowed
from aserve.ops import reference

LENGTHS = tuple((1, length) for length in (1, 7, 16, 17, 64, 120))
CASES = [
    *(Case(rows=LENGTHS, heads=heads, kv_heads=kv) for heads, kv in ((2, 2), (9, 3), (8, 1))),
    *(Case(rows=LENGTHS, block_size=size, head_size=72) for size in (8, 32)),
    Case(rows=LENGTHS, window=1),
    Case(rows=LENGTHS, window=20),
    Case(rows=LENGTHS, softcap=5.0),
    Case(rows=LENGTHS, slopes=True, heads=6, softcap=20.0, window=50),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ATOL = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}


def graphed(meta: AttentionMetadata) -> AttentionMetadata:
    """The metadata as a graph's: nothing of it is known to the host."""
    return dataclasses.replace(meta, query_start_host=[], seq_lens_host=[], graph=True)


def attend(batch: Batch, meta: AttentionMetadata, **scales: float) -> torch.Tensor:
    return reference.paged_attention(batch.q, batch.cache, meta, batch.scale, **batch.options, **scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    batch = make(case, dtype)
    got = attend(batch, graphed(batch.meta))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact(batch), atol=ATOL[dtype], rtol=0.02)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_caches(cache_dtype: torch.dtype) -> None:
    batch = narrowed(make(CASES[-1], torch.bfloat16), cache_dtype, 0.05, 0.5)
    for meta in (graphed(batch.meta), batch.meta):
        got = attend(batch, meta, k_scale=0.05, v_scale=0.5)
        torch.testing.assert_close(got.double(), exact(batch), atol=0.03, rtol=0.02)


def test_a_replay_sees_the_tensors_as_they_are_by_then() -> None:
    """Recorded with one batch's lengths and blocks, run with another's."""
    first = make(Case(rows=((1, 5), (1, 60), (1, 9))), torch.float32, seed=1)
    second = make(Case(rows=((1, 64), (1, 3), (1, 33))), torch.float32, seed=2)
    assert first.meta.block_tables.shape == second.meta.block_tables.shape

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *meta: torch.Tensor) -> torch.Tensor:
        return decode(q, (k, v), *meta, first.scale)

    recorded, run = (
        (batch.q, *batch.cache, batch.meta.block_tables, batch.meta.seq_lens) for batch in (first, second)
    )
    replay = make_fx(step)(*recorded)
    assert replay(*run).sub(exact(second)).abs().max() < 1e-5
    assert first.q.shape == second.q.shape


def test_nothing_is_read_on_the_host() -> None:
    """Tensors without data: whatever reads one fails."""
    batch = make(CASES[-1], torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        meta = graphed(batch.meta)
        for name in ("query_start", "seq_lens", "block_tables", "slot_mapping"):
            setattr(meta, name, mode.from_tensor(getattr(meta, name)))
        k, v = (mode.from_tensor(side) for side in batch.cache)
        q = mode.from_tensor(batch.q)
        slopes = mode.from_tensor(batch.options["alibi_slopes"])
        out = reference.paged_attention(
            q, (k, v), meta, batch.scale, window=50, softcap=20.0, alibi_slopes=slopes
        )
        assert out.shape == batch.q.shape
        stored = q[:, : k.shape[1]]
        reference.store_kv(stored, stored, (k, v), meta.slot_mapping)


def test_another_rows_nan_stays_there() -> None:
    """A row that only fills the bucket, and blocks of NaN behind a row's end."""
    batch = make(Case(rows=((1, 20), (1, 1))), torch.float32)
    k, v = batch.cache
    tables = batch.meta.block_tables.clone()
    used = set(tables[0, :2].tolist()) | {int(tables[1, 0])}
    free = next(block for block in range(len(k)) if block not in used)
    tables[0, 2:], tables[1] = free, free
    k[free], v[free] = math.nan, math.nan
    meta = dataclasses.replace(graphed(batch.meta), block_tables=tables)
    got = attend(batch, meta)
    assert got[1].isnan().all()
    torch.testing.assert_close(got[:1].double(), exact(batch)[:1], atol=1e-5, rtol=1e-5)
