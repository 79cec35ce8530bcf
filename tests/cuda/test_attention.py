"""Decode and prefill attention of the CUDA sources, against float64."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from aserve.gpu_check.paging import Case, exact
from tests.cuda.attention import arguments, attend, batch_of, compare
from tests.cuda.conftest import FULL
from tests.cuda.emulator import RANDOM, REVERSE, Emulator

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DECODE = ["decode_simple", "decode_tensor"]
HEAD_SIZES = [64, 80, 96, 112, 128, 192, 256]
EDGES = tuple((1, length) for length in (1, 7, 8, 9, 16, 17, 31, 33, 65))
FEW = ((1, 1), (1, 70), (1, 17))
MIXED = ((5, 5), (33, 140), (1, 1), (70, 70), (1, 100))


def check(
    emulator: Emulator,
    kernel: str,
    case: Case,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    splits: int = 1,
    max_query_len: int | None = None,
) -> None:
    batch = batch_of(case, dtype, cache_dtype)
    got = attend(emulator, kernel, batch, splits, max_query_len)
    compare(got, exact(batch), kernel, batch.values)


@pytest.mark.parametrize("kernel", DECODE)
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_decode_at_block_edges(emulator: Emulator, dtype: torch.dtype, block_size: int, kernel: str) -> None:
    for heads, kv_heads in ((4, 1), (2, 2)):
        check(emulator, kernel, Case(EDGES, heads, kv_heads, 64, block_size), dtype)


@pytest.mark.parametrize("kernel", DECODE)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_decode_of_head_sizes(emulator: Emulator, dtype: torch.dtype, head_size: int, kernel: str) -> None:
    for cache_dtype in (dtype, E4M3, E5M2):
        check(emulator, kernel, Case(FEW, 3, 1, head_size), dtype, cache_dtype)


@pytest.mark.parametrize("head_size", [8, 24, 72, 120, 136, 248])
def test_decode_of_odd_head_sizes(emulator: Emulator, head_size: int) -> None:
    for dtype in (F32, BF16):
        check(emulator, "decode_simple", Case(FEW, 4, 2, head_size), dtype)


@pytest.mark.parametrize("kernel", DECODE)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (8, 2), (8, 1), (16, 1), (17, 1), (71, 1)])
def test_decode_of_groups(emulator: Emulator, heads: int, kv_heads: int, kernel: str) -> None:
    check(emulator, kernel, Case(FEW, heads, kv_heads), BF16)


@pytest.mark.parametrize("kernel", DECODE)
@pytest.mark.parametrize("queries", [1, 2, 3, 5, 8])
def test_decode_of_several_queries(emulator: Emulator, queries: int, kernel: str) -> None:
    """As after speculation: rows of their own query counts, some with none."""
    rows = ((queries, 40), (1, 9), (0, 4), (queries, queries), (queries, 70))
    for window in (None, 20):
        case = Case(rows, 6, 2, window=window)
        check(emulator, kernel, case, BF16)
        check(emulator, kernel, case, BF16, splits=2)
        check(emulator, kernel, case, BF16, max_query_len=1)


@pytest.mark.parametrize("kernel", DECODE)
@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("order", [REVERSE, RANDOM])
def test_decode_in_splits(emulator: Emulator, order: int, splits: int, kernel: str) -> None:
    """Splits of whole 64s, some of them empty."""
    emulator.order(order, 99)
    for window in (None, 100):
        case = Case(((1, 300), (1, 1), (1, 128), (1, 64)), 4, 2, window=window)
        check(emulator, kernel, case, BF16, splits=splits)
        check(emulator, kernel, case, F16, E5M2, splits=splits)


OPTIONS = [
    *({"window": window} for window in (1, 16, 37, 1000)),
    {"softcap": 5.0},
    {"softcap": 1e5},
    {"slopes": True},
    {"slopes": True, "softcap": 20.0, "window": 50, "block_size": 8, "head_size": 80},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kernel", [*DECODE, "prefill"])
def test_options(emulator: Emulator, kernel: str, options: dict[str, object]) -> None:
    rows = MIXED if kernel == "prefill" else FEW
    for dtype, cache_dtype in ((BF16, BF16), (F16, E4M3)):
        check(emulator, kernel, Case(rows, 6, 2, **options), dtype, cache_dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_prefill_of_head_sizes(emulator: Emulator, dtype: torch.dtype, head_size: int) -> None:
    for cache_dtype in (dtype, E4M3, E5M2):
        check(emulator, "prefill", Case(((5, 5), (20, 70), (1, 3)), 3, 1, head_size), dtype, cache_dtype)


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (9, 3), (8, 1), (71, 1)])
def test_prefill_of_groups(emulator: Emulator, heads: int, kv_heads: int, block_size: int) -> None:
    """Whole prompts, chunks behind a cached prefix, single tokens; tiles with the end of a row in them."""
    rows = MIXED if heads < 9 else ((5, 5), (9, 80), (1, 1))
    check(emulator, "prefill", Case(rows, heads, kv_heads, block_size=block_size), BF16)


@pytest.mark.parametrize("order", [REVERSE, RANDOM])
def test_prefill_of_many_rows(emulator: Emulator, order: int) -> None:
    """More rows than a warp has lanes, empty ones among them."""
    emulator.order(order, 5)
    rows = tuple((index % 4, index % 4 + index) for index in range(1, 41))
    check(emulator, "prefill", Case(rows, 2, 1), BF16)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129])
def test_prefill_at_tile_edges(emulator: Emulator, length: int) -> None:
    check(emulator, "prefill", Case(((length, length),), 1, 1), F16)
    check(emulator, "prefill", Case(((length // 2, length),), 2, 1, 256), BF16)


@pytest.mark.parametrize("kernel", [*DECODE, "prefill"])
def test_nan_in_a_sequence_stays_in_it(emulator: Emulator, kernel: str) -> None:
    batch = batch_of(Case(((1, 40), (1, 100), (1, 40)), 4, 2), BF16)
    clean = attend(emulator, kernel, batch)
    batch.cache[0][int(batch.meta.block_tables[1, 5])] = torch.nan
    got = attend(emulator, kernel, batch)
    assert got[1].isnan().all()
    assert torch.equal(got[0], clean[0])
    assert torch.equal(got[2], clean[2])


@pytest.mark.parametrize("kernel", [*DECODE, "prefill"])
def test_slots_before_heads_in_the_cache(emulator: Emulator, kernel: str) -> None:
    batch = batch_of(Case(((1, 40), (3, 70)), 4, 2), BF16)
    want = attend(emulator, kernel, batch)
    args, out = arguments(emulator, batch)
    sides = [emulator.put(side.transpose(1, 2)) for side in batch.cache]
    args.k_cache, args.v_cache = (side.data_ptr() for side in sides)
    args.cache_slot, args.cache_head = sides[0].stride(1), sides[0].stride(2)
    emulator.call(kernel, args)
    assert torch.equal(out, want)


@pytest.mark.parametrize("kernel", [*DECODE, "prefill"])
@pytest.mark.parametrize("bad", [-1, 1 << 20])
def test_a_bad_block_id_shows(natively: Emulator, bad: int, kernel: str) -> None:
    batch = batch_of(Case(((1, 40), (1, 100)), 4, 2), BF16)
    batch.meta.block_tables[1, 4] = bad
    args, _ = arguments(natively, batch)
    with pytest.raises(AssertionError, match=r"accessed .* bytes from the start of a buffer"):
        natively.call(kernel, args)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_kernel_that_suits(emulator: Emulator, dtype: torch.dtype) -> None:
    """A step's prefill rows and decode rows, each a slice of the step, whatever their shapes."""
    shapes = [(((1, 30), (1, 9)), 4, 4), (FEW, 8, 1), (MIXED, 4, 2), (((3, 20), (2, 2)), 8, 2)]
    for rows, heads, kv_heads in shapes:
        for head_size in (64, 72):
            case = Case(rows, heads, kv_heads, head_size)
            batch = batch_of(case, dtype)
            got = attend(emulator, "attention", batch)
            compare(got, exact(batch), "attention", batch.values)
    batch = batch_of(Case(((20, 60), (1, 70), (1, 3)), 8, 2), dtype)
    args, out = arguments(emulator, batch, max_query_len=20)
    args.rows = 1
    emulator.call("attention", args)
    args.query_start += 4
    args.seq_lens += 4
    args.block_tables += 4 * args.table_stride
    args.rows, args.max_query_len = 2, 1
    emulator.call("attention", args)
    compare(out, exact(batch), "attention", batch.values)


def test_decode_splits(emulator: Emulator) -> None:
    splits = emulator.lib.aserve_cuda_decode_splits
    splits.argtypes = [ctypes.c_int64] * 4
    assert splits(1, 8, 8192, 132) == 32
    assert splits(1, 8, 100, 132) == 1
    assert splits(256, 8, 8192, 132) == 1
    assert splits(16, 8, 8192, 132) == 3
    assert splits(1, 1, 1 << 20, 132) == 64


def test_what_a_kernel_does_not_serve(emulator: Emulator) -> None:
    def refuses(kernel: str, case: Case, dtype: torch.dtype, **changes: int) -> bool:
        args, _ = arguments(emulator, batch_of(case, dtype))
        for name, value in changes.items():
            setattr(args, name, value)
        return emulator.refuses(kernel, args)

    usual = Case(FEW, 4, 2)
    for kernel in (*DECODE, "prefill"):
        assert not refuses(kernel, usual, BF16)
        assert refuses(kernel, Case(FEW, 4, 2, 12), BF16)
        assert refuses(kernel, usual, BF16, head_size=264)
        assert refuses(kernel, usual, BF16, block_size=12)
        assert refuses(kernel, usual, BF16, kv_heads=3)
        assert refuses(kernel, usual, BF16, splits=2)
        assert refuses(kernel, usual, BF16, q_head=60)
        assert refuses(kernel, usual, BF16, cache_dtype=2)
    for kernel in ("decode_tensor", "prefill"):
        assert refuses(kernel, usual, F32)
        assert refuses(kernel, Case(FEW, 4, 2, 72), BF16)


@pytest.mark.skipif(not FULL, reason="make kernels-full")
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_combination(emulator: Emulator, dtype: torch.dtype, block_size: int, head_size: int) -> None:
    groups = ((2, 2), (6, 2), (8, 1))
    for (heads, kv_heads), cache_dtype, order in itertools.product(groups, (dtype, E4M3, E5M2), range(3)):
        emulator.order(order, 3)
        for window, softcap, slopes in ((None, None, False), (37, None, True), (None, 10.0, False)):
            options = (heads, kv_heads, head_size, block_size, window, softcap, slopes)
            for kernel in DECODE:
                rows = ((1, 1), (3, 200), (1, block_size), (2, 129))
                check(emulator, kernel, Case(rows, *options), dtype, cache_dtype, splits=1 + order)
            check(emulator, "prefill", Case(((17, 17), (70, 300), (1, 65)), *options), dtype, cache_dtype)
            assert emulator.release() == 0
