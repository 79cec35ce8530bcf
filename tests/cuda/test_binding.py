"""The CUDA operations as torch sees them: the library where it was built, and its binding over the emulation.

The emulated binding is the same source registered for tensors on the CPU, under operations that take their
schemas from the CPU library's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aserve.gpu_check.paging import Batch, Case, exact, make
from aserve.ops import native, reference
from tests.cuda.attention import batch_of, compare, quantised
from tests.cuda.conftest import ROOT
from tests.cuda.emulator import Emulator

CUDA_LIBRARY = native.LIBRARY.with_name("libaserve_cuda.so")
BOUND = (
    "copy_blocks",
    "fused_add_rms_norm",
    "gated",
    "greedy_logprob",
    "paged_attention",
    "penalties",
    "rms_norm",
    "rope_and_store",
    "rotary_embedding",
    "sample",
    "store_kv",
    "swap_blocks",
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}

LOADING = """
import json, sys, torch
cpu, cuda = sys.argv[1:]
torch.ops.load_library(cpu)
def state():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aserve::")]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {n: [k for k in ("CPU", "CUDA") if has(n, k)] for n in names}
    return {n: [str(getattr(torch.ops.aserve, n[8:]).default._schema), keys[n]] for n in names}
before = state()
torch.ops.load_library(cuda)
maps = open("/proc/self/maps").read()
print(json.dumps([before, state(), "libcuda.so" in maps or "libcudart.so" in maps]))
"""


@pytest.mark.skipif(not CUDA_LIBRARY.exists(), reason="no CUDA library: python setup_ext.py --target cuda")
def test_the_library_loads_without_a_gpu_and_adds_kernels_to_the_same_schemas() -> None:
    if not native.LIBRARY.exists():
        pytest.skip("no CPU library, which defines the schemas: python setup_ext.py")
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(native.LIBRARY), str(CUDA_LIBRARY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after, needs_cuda = json.loads(done.stdout)
    assert {name: schema for name, (schema, _) in before.items()} == {
        name: schema for name, (schema, _) in after.items()
    }
    assert all(keys == ["CPU"] for _, keys in before.values())
    on_cuda = {name.removeprefix("aserve::") for name, (_, keys) in after.items() if "CUDA" in keys}
    assert on_cuda == set(BOUND)
    assert all("CPU" in keys for _, keys in after.values())
    assert not needs_cuda


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    bound_of = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want.double(), atol=bound_of, rtol=bound_of)


DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


@DTYPES
def test_norms(bound: Any, emulator: Emulator, dtype: torch.dtype) -> None:
    wide = emulator.put(torch.randn(3, 4, 96).to(dtype))
    x = wide[:, 1:3, :64]  # groups of rows
    weight, out = emulator.put(torch.randn(64).to(dtype)), emulator.empty((3, 2, 64), dtype)
    bound.rms_norm(x, weight, 1e-5, out)
    close(out, reference.rms_norm(x, weight, 1e-5))
    residual, total = emulator.put(torch.randn(3, 2, 64).to(dtype)), emulator.empty((3, 2, 64), dtype)
    bound.fused_add_rms_norm(x, residual, weight, 1e-5, out, total)
    wanted, wanted_total = reference.fused_add_rms_norm(x, residual, weight, 1e-5)
    close(out, wanted)
    close(total, wanted_total)


@DTYPES
def test_gated(bound: Any, emulator: Emulator, dtype: torch.dtype) -> None:
    x, out = emulator.put(torch.randn(5, 48).to(dtype)), emulator.empty((5, 24), dtype)
    functions: list[Callable[..., torch.Tensor]] = [
        reference.silu_and_mul,
        reference.gelu_and_mul,
        lambda x: reference.gelu_and_mul(x, "none"),
    ]
    for activation, function in enumerate(functions):
        bound.gated(x, activation, out)
        close(out, function(x))


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_and_storing(bound: Any, emulator: Emulator, dtype: torch.dtype, interleaved: bool) -> None:
    qkv = emulator.put(torch.randn(5, 8 * 32).to(dtype))
    q, k, v = (x.unflatten(-1, (-1, 32)) for x in qkv.split([128, 64, 64], -1))
    positions = emulator.put(torch.tensor([0, 7, 3, 3, 19]))
    slots = emulator.put(torch.tensor([9, 0, 31, 5, 16]))
    angles = torch.rand(20, 12)
    cos_sin = emulator.put(torch.cat([angles.cos(), angles.sin()], -1))
    q_out, k_out = emulator.empty((5, 4, 32), dtype), emulator.empty((5, 2, 32), dtype)
    bound.rotary_embedding(q, k, positions, cos_sin, interleaved, q_out, k_out)
    wanted_q, wanted_k = reference.rotary_embedding(q, k, positions, cos_sin, interleaved)
    close(q_out, wanted_q)
    close(k_out, wanted_k)

    start = torch.zeros(4, 2, 8, 32, dtype=dtype)
    cache, wanted = [emulator.put(start), emulator.put(start)], (start.clone(), start.clone())
    bound.rope_and_store(q, k, v, positions, cos_sin, interleaved, *cache, slots, 1.0, 1.0, q_out)
    reference.rope_and_store(q, k, v, positions, cos_sin, wanted, slots, interleaved)
    close(q_out, wanted_q)
    for got, want in zip(cache, wanted, strict=True):
        close(got, want)
    plain, wanted = [emulator.put(start), emulator.put(start)], (start.clone(), start.clone())
    bound.store_kv(k, v, *plain, slots, 1.0, 1.0)
    reference.store_kv(k, v, wanted, slots)
    for got, want in zip(plain, wanted, strict=True):
        assert torch.equal(got, want)


CASES = [
    Case(((1, 300), (1, 7)), 2, 2),  # one query head a KV head, split
    Case(((1, 40), (3, 30), (1, 900)), 8, 2),  # splits, rows of different lengths
    Case(((1, 33), (1, 9)), 16, 1),
    Case(((20, 50), (40, 40)), 4, 2),  # prefill with and without a prefix
    Case(((30, 35), (1, 60), (1, 5)), 4, 1),  # a row far above the average
    Case(((1, 90), (1, 20)), 8, 2, 128, 8, window=40, softcap=20.0, slopes=True),
]


def run_attention(
    bound: Any, emulator: Emulator, batch: Batch, scales: tuple[float, float] = (1.0, 1.0), longest: int = 0
) -> None:
    q, out = emulator.put(batch.q), emulator.empty(batch.q.shape, batch.q.dtype)
    meta, slopes = batch.meta, batch.options.get("alibi_slopes")
    bound.paged_attention(
        q,
        *(emulator.put(side) for side in batch.cache),
        *(emulator.put(each) for each in (meta.query_start, meta.seq_lens, meta.block_tables)),
        batch.scale,
        batch.case.window or 0,
        batch.case.softcap or 0.0,
        None if slopes is None else emulator.put(slopes),
        *scales,
        longest,
        out,
    )
    compare(out, exact(batch), "whichever", batch.values)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(bound: Any, emulator: Emulator, dtype: torch.dtype, case: Case) -> None:
    run_attention(bound, emulator, batch_of(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_that_is_told_the_longest_row(bound: Any, emulator: Emulator, case: Case) -> None:
    batch = batch_of(case, torch.bfloat16)
    run_attention(bound, emulator, batch, longest=batch.meta.max_query_len)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_attention_of_8_bit_caches(bound: Any, emulator: Emulator, cache_dtype: torch.dtype) -> None:
    for scales in ((1.0, 1.0), (0.05, 0.3)):
        batch = quantised(make(CASES[1], torch.bfloat16, 0), cache_dtype, *scales)
        run_attention(bound, emulator, batch, scales)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_storing_in_8_bit_caches(bound: Any, emulator: Emulator, cache_dtype: torch.dtype) -> None:
    """With scales, of values too large for the type too; what torch writes, bit for bit."""
    k, v = (torch.randn(5, 2, 32) * 300 for _ in range(2))
    slots = torch.tensor([9, 0, 31, 5, 16])
    start = torch.zeros(4, 2, 8, 32, dtype=cache_dtype)
    cache, wanted = [emulator.put(start), emulator.put(start)], (start.clone(), start.clone())
    bound.store_kv(emulator.put(k), emulator.put(v), *cache, emulator.put(slots), 0.3, 2.5)
    reference.store_kv(k, v, wanted, slots, 0.3, 2.5)
    for got, want in zip(cache, wanted, strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def sides_of(emulator: Emulator, count: int) -> list[torch.Tensor]:
    return [emulator.put(torch.randn(count, 2, 8, 5)) for _ in range(4)]


def test_copies_are_made_in_order(bound: Any, emulator: Emulator) -> None:
    """4 goes to 0 after 0 went to 5, and 1 receives the new 5."""
    caches = sides_of(emulator, 6)
    before = [side.clone() for side in caches]
    bound.copy_blocks(caches, torch.tensor([(0, 5), (4, 0), (5, 1), (2, 2), (3, 4), (1, 4)]))
    for side, was in zip(caches, before, strict=True):
        assert torch.equal(side, torch.stack([was[at] for at in (4, 0, 2, 3, 0, 0)]))
    bound.copy_blocks(caches, torch.empty(0, 2, dtype=torch.int64))
    bound.copy_blocks([], torch.tensor([(0, 1)]))


def test_a_swaps_target_may_be_written_twice(bound: Any, emulator: Emulator) -> None:
    caches, others = sides_of(emulator, 6), sides_of(emulator, 3)
    kept = [side.clone() for side in others]
    bound.swap_blocks(caches, others, torch.tensor([(5, 0), (1, 2), (3, 0)]))
    for side, source, had in zip(others, caches, kept, strict=True):
        assert torch.equal(side, torch.stack([source[3], had[1], source[1]]))


def test_bad_copies_are_refused_and_copy_nothing(bound: Any, emulator: Emulator) -> None:
    caches, others = sides_of(emulator, 6), sides_of(emulator, 3)
    before = [side.clone() for side in caches + others]
    for pair in ((0, 6), (6, 0), (-1, 0), (0, -1)):
        refused("block id is outside", bound.copy_blocks, caches, torch.tensor([(1, 2), pair]))
    refused("block id is outside", bound.swap_blocks, caches, others, torch.tensor([(5, 3)]))
    refused("4 sources and 3 targets", bound.swap_blocks, caches, others[:3], torch.tensor([(0, 0)]))
    mixed = [caches[0], *others[:3]]
    refused("one layout", bound.copy_blocks, mixed, torch.tensor([(0, 1)]))
    refused("one dtype", bound.swap_blocks, caches[:1], [others[0].half()], torch.tensor([(0, 0)]))
    refused("int64", bound.copy_blocks, caches, torch.tensor([(0, 1)], dtype=torch.int32))
    for side, was in zip(caches + others, before, strict=True):
        assert torch.equal(side, was)


def test_draws_are_the_references(bound: Any, emulator: Emulator) -> None:
    logits = emulator.put(torch.randn(3, 5000) * 3)[:, :4999]
    columns = (torch.tensor([0.7, 0.0, 2.0]), torch.tensor([3, -9, 1 << 62]), torch.tensor([0, 4, 70000]))
    token, logprob = emulator.empty((3,), torch.int64), emulator.empty((3,), torch.float32)
    bound.sample(logits, *(emulator.put(each) for each in columns), token, logprob)
    wanted, wanted_logprob = reference.sample(logits, *columns)
    assert torch.equal(token, wanted)
    torch.testing.assert_close(logprob, wanted_logprob)


def test_penalties_are_the_references(bound: Any, emulator: Emulator) -> None:
    logits = torch.randn(3, 60)
    held = emulator.put(logits)
    seen = (torch.tensor([0, 4, 4, 7]), torch.tensor([1, 59, 0, 7, 3, 2, 58]))
    rest = (torch.tensor([0, 1, 2, 3, 0, 5, 1], dtype=torch.int32), *torch.rand(3, 3))
    bound.penalties(held, *(emulator.put(each) for each in (*seen, *rest)))
    reference.penalties(logits, *seen, *rest)
    torch.testing.assert_close(held, logits)


def test_greedy(bound: Any, emulator: Emulator) -> None:
    logits = emulator.put(torch.randn(3, 5000))[:, :4999]
    token, logprob = emulator.empty((3,), torch.int64), emulator.empty((3,), torch.float32)
    bound.greedy_logprob(logits, token, logprob)
    wanted, wanted_logprob = reference.greedy_logprob(logits)
    assert torch.equal(token, wanted)
    torch.testing.assert_close(logprob, wanted_logprob)


def test_no_rows(bound: Any) -> None:
    none = torch.empty(0, 8)
    bound.rms_norm(none, torch.ones(8), 1e-5, none.clone())
    bound.gated(none, 0, torch.empty(0, 4))
    bound.greedy_logprob(none, torch.empty(0, dtype=torch.int64), torch.empty(0))


def refused(message: str, function: Any, *arguments: Any) -> None:
    with pytest.raises(RuntimeError, match=message):
        function(*arguments)


def test_bad_arguments_are_refused_before_a_launch(bound: Any) -> None:
    x, weight = torch.randn(2, 8), torch.ones(8)
    refused("weight must have size 8", bound.rms_norm, x, weight[:4], 1e-5, x.clone())
    refused("must have one dtype", bound.rms_norm, x, weight, 1e-5, x.half())
    refused("dense from dimension", bound.rms_norm, x, weight, 1e-5, x.t().contiguous().t())
    refused("do not serve", bound.rms_norm, x, weight.half(), 1e-5, x.clone())
    refused("unknown activation 3", bound.gated, x, 3, torch.empty(2, 4))
    cache, ids = torch.randn(3, 1, 12, 8), torch.zeros(2, dtype=torch.int32)
    q, table = torch.randn(1, 1, 8), torch.zeros(1, 1, dtype=torch.int32)
    arguments = (q, cache, cache.clone(), ids, ids[:1], table, 1.0, 0, 0.0, None, 1.0, 1.0, 0, q.clone())
    refused("block size must be a power of two, is 12", bound.paged_attention, *arguments)
    cache = torch.randn(3, 1, 8, 8)
    arguments = (q, cache, cache.clone(), ids, ids[:1], table, 1.0, 0, 0.0, None)
    refused("only an 8-bit cache has scales", bound.paged_attention, *arguments, 2.0, 1.0, 0, q.clone())
    refused("scale must be positive, is 0", bound.paged_attention, *arguments, 1.0, 0.0, 0, q.clone())
    refused("max_query_len must not be", bound.paged_attention, *arguments, 1.0, 1.0, -1, q.clone())
    arguments = (
        q,
        cache,
        cache.clone(),
        ids.long(),
        ids[:1],
        table,
        1.0,
        0,
        0.0,
        None,
        1.0,
        1.0,
        0,
        q.clone(),
    )
    refused("query_start must be int32", bound.paged_attention, *arguments)
    logits, token, logprob = torch.randn(2, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    refused("seeds must be int64", bound.sample, logits, logprob, logprob, token, token, logprob)
    ids = torch.zeros(3, dtype=torch.int64)
    rates = (logprob, logprob, logprob)
    refused("counts must be int32", bound.penalties, logits, ids, ids, ids, *rates)


def test_cuda_is_not_built_unasked(tmp_path: Path) -> None:
    """nvcc that fails, and is therefore seen when it is called."""
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/sh\necho called >&2\nexit 1\n")
    script.chmod(0o755)
    copy = tmp_path / "project"
    (copy / "aserve").mkdir(parents=True)
    shutil.copytree(ROOT / "cuda_ext", copy / "cuda_ext")
    shutil.copy(ROOT / "setup_ext.py", copy)
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nfor o; do [ "$p" = -o ] && : > "$o"; p=$o; done; echo 1\n')
    compiler.chmod(0o755)

    def build(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(copy / "setup_ext.py"), *arguments],
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin", "CXX": str(compiler), "NVCC": str(script), **more},
            check=False,
        )

    assert build().returncode == 0
    asked = build("--target", "cuda")
    assert (asked.returncode, "called" in asked.stderr) == (1, True)
    assert build(ASERVE_CUDA_ARCH="80").returncode == 1
    missing = build("--target", "cuda", NVCC="no-such-nvcc")
    assert (missing.returncode, "no nvcc" in missing.stderr) == (3, True)
