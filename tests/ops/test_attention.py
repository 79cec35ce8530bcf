"""Paged attention against float64, and the independence of its rows."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import pytest
import torch

from aserve.errors import ConfigError
from aserve.gpu_check.paging import Batch, Case, exact, make
from aserve.ops import native

MIXED = ((5, 5), (33, 300), (70, 70), (1, 1), (1, 17), (1, 300))
BLOCK_EDGES = tuple((1, length) for length in (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65))

CASES = [
    Case(rows=((1, 1),)),
    Case(rows=((3, 3),), head_size=8, heads=1, kv_heads=1),
    *(Case(rows=BLOCK_EDGES, block_size=size, heads=3, kv_heads=1) for size in (8, 16, 32)),
    *(Case(rows=MIXED, heads=heads, kv_heads=kv) for heads, kv in ((2, 2), (9, 3), (8, 2), (8, 1), (71, 1))),
    *(Case(rows=MIXED, head_size=size) for size in (16, 72, 80, 96, 128, 256)),
    *(Case(rows=MIXED, window=window) for window in (1, 16, 37, 256, 1000)),
    Case(rows=MIXED, softcap=5.0),
    Case(rows=MIXED, softcap=1e5),
    Case(rows=MIXED, slopes=True, heads=8),
    Case(rows=MIXED, slopes=True, heads=6, softcap=20.0, window=50, block_size=8, head_size=80),
    Case(rows=((1, 255), (1, 256), (1, 257), (1, 600)), heads=9, kv_heads=3),
    Case(rows=((1, 600),), window=40, block_size=32),
    Case(rows=((256, 256), (4, 1030)), heads=3, kv_heads=1, head_size=32),
    Case(rows=((0, 4), (2, 9), (0, 1), (1, 20))),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def attend(module: ModuleType, batch: Batch) -> torch.Tensor:
    out: torch.Tensor = module.paged_attention(batch.q, batch.cache, batch.meta, batch.scale, **batch.options)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(implementation: ModuleType, case: Case, dtype: torch.dtype) -> None:
    batch = make(case, dtype)
    got, want = attend(implementation, batch), exact(batch)
    assert got.dtype == dtype
    assert got.shape == want.shape
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=5e-6)
    elif implementation is native:
        # float32 inside, so no more than the rounding of the result
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0.51 * step)
    else:
        torch.testing.assert_close(got.double(), want, atol=4 * torch.finfo(dtype).eps, rtol=0.02)


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize(
    "case",
    [
        Case(rows=MIXED, heads=9, kv_heads=3),
        Case(rows=MIXED, heads=4, kv_heads=4, window=37),
        Case(rows=((90, 700), (1, 700), (1, 3)), heads=6, kv_heads=2, window=300, softcap=30.0),
    ],
    ids=str,
)
def test_a_row_does_not_depend_on_its_batch(loaded: ModuleType, level: str, case: Case) -> None:
    """Bit for bit: alone or in company, one thread or three, as a prefill or token by token."""
    choose(level)
    for dtype in (torch.float32, torch.bfloat16):
        batch = make(case, dtype)
        together = attend(loaded, batch)
        torch.set_num_threads(3)
        assert torch.equal(attend(loaded, batch), together)
        for row, (tokens, _) in enumerate(case.rows):
            start = batch.meta.query_start_host[row]
            for first, last in {(0, tokens), (0, 1), (tokens // 2, tokens), (tokens - 1, tokens)}:
                if first < last:
                    alone = attend(loaded, batch.row(row, first, last))
                    assert torch.equal(alone, together[start + first : start + last]), (row, first, last)
        torch.set_num_threads(1)
        assert torch.equal(attend(loaded, batch.row(0)), together[: case.rows[0][0]])


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize(
    "case",
    [
        *(Case(rows=((70, 330),), heads=2 * group, kv_heads=2) for group in range(1, 8)),
        *(Case(rows=((40, 300),), heads=4, kv_heads=1, head_size=size) for size in (8, 24, 72, 80, 256)),
        Case(rows=((80, 600),), heads=4, kv_heads=1, window=100, block_size=5),
        Case(rows=((80, 300),), heads=3, kv_heads=1, softcap=20.0, slopes=True, block_size=48),
    ],
    ids=str,
)
def test_one_by_one_is_in_chunks_is_at_once(loaded: ModuleType, level: str, case: Case) -> None:
    """Bit for bit. Chunks of 1 to 5 tokens go by the paths of few queries and of many."""
    choose(level)
    tokens = case.rows[0][0]
    for dtype in DTYPES:
        batch = make(case, dtype)
        at_once = attend(loaded, batch)
        for chunk in (1, 2, 3, 5, 17):
            pieces = [
                attend(loaded, batch.row(0, first, min(first + chunk, tokens)))
                for first in range(0, tokens, chunk)
            ]
            assert torch.equal(torch.cat(pieces), at_once), (dtype, chunk)


def choose(level: str) -> None:
    try:
        native.select(level)
    except ConfigError as error:
        pytest.skip(str(error))


def test_nan_in_a_sequence_stays_in_it(loaded: ModuleType) -> None:
    case = Case(rows=((1, 40), (1, 300), (1, 40)))
    batch = make(case, torch.float32)
    clean = attend(loaded, batch)
    block = int(batch.meta.block_tables[1, 17])
    batch.cache[0][block] = torch.nan
    got = attend(loaded, batch)
    assert got[1].isnan().all()
    assert torch.equal(got[0], clean[0])
    assert torch.equal(got[2], clean[2])


def test_other_cache_layouts_and_tables(loaded: ModuleType) -> None:
    """Slots before heads in memory, one allocation for keys and values, tables that are views."""
    case = Case(rows=MIXED)
    batch = make(case, torch.bfloat16)
    want = attend(loaded, batch)
    both = torch.stack([side.transpose(1, 2) for side in batch.cache])
    wide = torch.full((len(MIXED) * 2, batch.meta.block_tables.shape[1] + 5), -1, dtype=torch.int32)
    wide[::2, 5:] = batch.meta.block_tables
    meta = dataclasses.replace(batch.meta, block_tables=wide[::2, 5:])
    moved = dataclasses.replace(batch, cache=(both[0].transpose(1, 2), both[1].transpose(1, 2)), meta=meta)
    assert torch.equal(attend(loaded, moved), want)


def changed(batch: Batch, **fields: Any) -> Batch:
    return dataclasses.replace(batch, meta=dataclasses.replace(batch.meta, **fields))


def test_bad_arguments_are_refused(loaded: ModuleType) -> None:
    case = Case(rows=((2, 20), (1, 40)))
    batch = make(case, torch.float32)
    tables, int32 = batch.meta.block_tables, torch.int32
    for bad in (-1, batch.cache[0].shape[0]):
        wrong = tables.clone()
        wrong[1, 2] = bad
        with pytest.raises(RuntimeError, match="block id"):
            attend(loaded, changed(batch, block_tables=wrong))
    with pytest.raises(RuntimeError, match="row 1 is longer than its block table"):
        attend(loaded, changed(batch, block_tables=tables[:, :2].contiguous()))
    with pytest.raises(RuntimeError, match="row 0 has more tokens"):
        attend(loaded, changed(batch, seq_lens=torch.tensor([1, 40], dtype=int32)))
    with pytest.raises(RuntimeError, match="number of tokens, 3"):
        attend(loaded, changed(batch, query_start=torch.tensor([0, 2, 4], dtype=int32)))
    with pytest.raises(RuntimeError, match="falls at row 1"):
        attend(loaded, changed(batch, query_start=torch.tensor([0, 4, 3], dtype=int32)))
    with pytest.raises(RuntimeError, match="block_tables must be int32"):
        attend(loaded, changed(batch, block_tables=tables.long()))
    with pytest.raises(RuntimeError, match="do not divide"):
        attend(loaded, dataclasses.replace(batch, q=batch.q[:, :3]))
    with pytest.raises(RuntimeError, match="must have size 64 in dimension 3"):
        attend(loaded, dataclasses.replace(batch, cache=(batch.cache[0][..., :56], batch.cache[1][..., :56])))
    with pytest.raises(RuntimeError, match="one layout"):
        attend(loaded, dataclasses.replace(batch, cache=(batch.cache[0], batch.cache[1].mT.contiguous().mT)))


@pytest.mark.parametrize("head_size", [12, 264])
def test_other_head_sizes_go_to_the_reference(implementation: ModuleType, head_size: int) -> None:
    batch = make(Case(rows=((3, 9), (1, 20)), head_size=head_size), torch.float32)
    torch.testing.assert_close(attend(implementation, batch).double(), exact(batch), atol=5e-6, rtol=5e-6)
