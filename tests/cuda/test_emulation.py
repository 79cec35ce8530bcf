"""The emulation itself: what it computes, and the mistakes it must not let through."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from tests.cuda.emulator import FORWARD, RANDOM, REVERSE, Emulator, orders, ptr

ORDERS = [FORWARD, REVERSE, RANDOM]


def run(emulator: Emulator, name: str, *arguments: Any) -> str:
    """The fault in words, or "" where all went well."""
    values = [ptr(a) if isinstance(a, torch.Tensor) else ctypes.c_int(a) for a in arguments]
    status = getattr(emulator.lib, name)(*values)
    message = emulator.error()
    assert (status != 0) == bool(message)
    return message


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_shows(emulator: Emulator, order: int) -> None:
    emulator.order(order)
    values = emulator.put(torch.arange(64.0))
    for barrier in (1, 0):
        out = emulator.empty((64,), torch.float32)
        assert run(emulator, "fault_swap", out, values, barrier) == ""
        assert torch.equal(out, values.flip(0)) == bool(barrier)


def test_a_missing_barrier_before_reuse_shows(emulator: Emulator) -> None:
    values = emulator.put(torch.arange(64.0))
    want = values.flip(0) * 4 + 6
    caught = []
    for order, seed in orders():
        emulator.order(order, seed)
        for barrier in (1, 0):
            out = emulator.empty((64,), torch.float32)
            assert run(emulator, "fault_reuse", out, values, barrier) == ""
            if barrier:
                assert torch.equal(out, want)
            else:
                caught.append(not torch.equal(out, want))
    assert all(caught)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fault_unreachable", "barrier at faults.cu:"),
        ("fault_different_barriers", "is at the one at line"),
        ("fault_divergent_shuffle", "meets lane"),
        ("fault_lost_lane", "ended"),
        ("fault_barrier_and_shuffle", "waits at a barrier"),
        ("fault_mask", "reads lane 9, which is not in the mask"),
    ],
)
def test_threads_that_never_meet(emulator: Emulator, name: str, message: str, order: int) -> None:
    emulator.order(order)
    said = run(emulator, name, emulator.empty((64,), torch.float32))
    assert message in said
    assert "block (0, 0, 0), thread" in said


@pytest.mark.parametrize("bad", [-1, -1000, 4, 9999])
def test_a_bad_block_id_shows(natively: Emulator, bad: int) -> None:
    cache = natively.put(torch.arange(4 * 8192.0).view(4, 8192))
    table = torch.arange(32, dtype=torch.int32) % 4
    out = natively.empty((32,), torch.float32)
    assert run(natively, "fault_gather", out, cache, natively.put(table), 8192) == ""
    assert torch.equal(out, cache[table.long(), torch.arange(32)])
    table[17] = bad
    said = run(natively, "fault_gather", out, cache, natively.put(table), 8192)
    assert "thread 17: accessed" in said
    assert f"{(bad * 8192 + 17) * 4} bytes from the start of a buffer of {4 * 8192 * 4} bytes" in said


def test_the_process_lives_on_after_a_fault(natively: Emulator) -> None:
    out = natively.empty((64,), torch.float32)
    assert "accessed" in run(natively, "fault_behind", out, 1 << 20)
    assert "its stack is full" in run(natively, "fault_stack", out)
    assert run(natively, "fault_swap", out, natively.put(torch.zeros(64)), 1) == ""
    assert torch.equal(out, torch.zeros(64))


def test_a_write_into_the_last_bytes_of_a_page_shows(natively: Emulator) -> None:
    out = natively.empty((37,), torch.uint8)
    assert run(natively, "fault_behind", out, 36) == ""
    assert natively.release() == 0
    out = natively.empty((37,), torch.uint8)
    assert run(natively, "fault_behind", out, 37) == ""
    assert natively.release() == 1


def test_bad_accesses_and_launches(natively: Emulator) -> None:
    out, values = natively.empty((128,), torch.float32), natively.put(torch.zeros(64))
    assert "16 bytes at" in run(natively, "fault_misaligned", out, values)
    assert "behind the dynamic shared memory" in run(natively, "fault_shared_overrun", 0)
    assert "behind a static shared array" in run(natively, "fault_shared_overrun", 1)
    for threads, dynamic, message in (
        (33, 0, "multiple of 32"),
        (1056, 0, "multiple of 32"),
        (64, 233000, "dynamic shared memory"),
    ):
        assert message in run(natively, "fault_launch", out, threads, dynamic)


@pytest.mark.parametrize("order", ORDERS)
def test_asynchronous_copies(emulator: Emulator, order: int) -> None:
    emulator.order(order)
    values = emulator.put(torch.arange(256, dtype=torch.int32).view(64, 4))
    out = emulator.empty((64, 4), torch.int32)
    assert run(emulator, "fault_async", out, values, 1) == ""
    want = values.clone()
    want[::3] = 0
    assert torch.equal(out, want)
    if order != REVERSE:  # the order in which copies land at once
        assert run(emulator, "fault_async", out, values, 0) == ""
        assert not torch.equal(out, want)
    assert "never waited for" in run(emulator, "fault_forgotten_copy", values)


@pytest.mark.parametrize("order", ORDERS)
def test_warp_operations(emulator: Emulator, order: int) -> None:
    emulator.order(order, 7)
    counters = emulator.put(torch.zeros(2, dtype=torch.int32))
    out = emulator.empty((64, 8), torch.int32)
    assert run(emulator, "show_warp", out, counters) == ""
    lane = torch.arange(64) % 32
    want = [
        lane // 2 * 3,
        lane ^ 5,
        torch.where(lane < 29, lane + 3, lane),
        torch.where(lane % 8 >= 3, lane - 3, lane),
        torch.full((64,), sum(1 << i for i in range(0, 32, 3))),
        lane // 8 * 64 + 28,
        lane // 4 * 4 + 3,
        torch.where(lane < 16, lane ^ 1, lane ^ 2),
    ]
    assert torch.equal(out, torch.stack(want, 1).int())
    assert counters.tolist() == [128, 127]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma(emulator: Emulator, dtype: torch.dtype, transposed: int) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    c = emulator.empty((16, 8), torch.float32)
    half = int(dtype == torch.float16)
    before = emulator.conflicts()
    assert run(emulator, "show_mma", c, emulator.put(a), emulator.put(b), half, transposed) == ""
    right = b.double() if transposed else b.double().T
    torch.testing.assert_close(c.double(), (a.double() @ right)[:, :8], atol=1e-5, rtol=1e-5)
    # Rows of 32 bytes: the rows of a matrix share banks, and that is counted.
    assert emulator.conflicts() > before
    emulator.lib.simt_forget_conflicts(ctypes.c_int64(before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_conversions(emulator: Emulator, dtype: torch.dtype) -> None:
    """Every code to float32, and values of every size back."""
    bits = 8 * dtype.itemsize
    codes = torch.arange(1 << bits, dtype=torch.int32).to(torch.uint16 if bits == 16 else torch.uint8)
    codes = emulator.put(codes.view(dtype))
    exact = codes.float()
    finite = exact[exact.isfinite()].double()
    halves = (finite.sort().values[:-1] + finite.sort().values[1:]) / 2
    values = torch.cat((finite, halves, halves * (1 + 1e-6), halves * (1 - 1e-6))).float()
    values = torch.cat((values, torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])))
    values = emulator.put(torch.cat((values, torch.randn(1000) * 100)))
    wide, narrow = emulator.empty(exact.shape, torch.float32), emulator.empty(values.shape, dtype)
    kind = {torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3, torch.float8_e5m2: 4}[dtype]
    count = max(len(codes), len(values))
    wide, narrow = emulator.empty((count,), torch.float32), emulator.empty((count,), dtype)
    padded_codes, padded_values = emulator.empty((count,), dtype), emulator.put(torch.zeros(count))
    padded_codes[: len(codes)] = codes
    padded_values[: len(values)] = values
    assert run(emulator, "show_convert", wide, narrow, padded_codes, padded_values, count, kind) == ""
    torch.testing.assert_close(wide[: len(codes)], exact, atol=0, rtol=0, equal_nan=True)
    most = torch.finfo(dtype).max
    want = (values.clamp(-most, most) if bits == 8 else values).to(dtype).float()
    torch.testing.assert_close(narrow[: len(values)].float(), want, atol=0, rtol=0, equal_nan=True)
