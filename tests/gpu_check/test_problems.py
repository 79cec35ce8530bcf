"""The checks themselves: that a wrong result fails, and that costs and comparisons are what they say."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from aserve.gpu_check import cases, timed
from aserve.gpu_check.paging import Case, exact, make
from aserve.gpu_check.problems.base import Check, Want, bits, distance, worst
from aserve.gpu_check.problems.cache import Step
from aserve.gpu_check.problems.rows import Rows
from aserve.gpu_check.recording import record

BF16 = "bfloat16"


def firsts_of_each_op() -> list[Check]:
    found: dict[str, Check] = {}
    for check in cases.firsts(cases.every()):
        if check.dtype == BF16:
            found.setdefault(check.op, check)
    return list(found.values())


@pytest.mark.parametrize("check", firsts_of_each_op(), ids=str)
def test_any_wrong_element_fails(check: Check) -> None:
    """The oracle's own result passes; with a NaN, a zero too many or another bit anywhere it does not."""
    problem = cases.OPERATIONS[check.op].make(check, 3, "cpu", False)
    wanted = problem.expected()
    assert set(wanted) == set(problem.written)
    in_place = check.op == "penalties"
    assert worst(problem.buffers, wanted)[0] > (1 if in_place else 1e30), "outputs begin poisoned"
    held = {name: want.value.to(problem.buffers[name].dtype) for name, want in wanted.items()}
    assert worst(held, wanted)[0] <= 1
    for name, value in held.items():
        flat = value.flatten()
        known = (~flat.double().isnan()).nonzero().flatten()
        for at in known[:: max(1, len(known) // 5)].tolist():
            kept = flat[at].clone()
            for other in (kept.double() + 0.1 + abs(kept.double()) / 8, math.nan):
                if other != other and not value.is_floating_point():
                    continue
                changed = flat.clone()
                changed[at] = float(other) if value.is_floating_point() else int(kept) + 1
                wrong = {**held, name: changed.view(value.shape)}
                off, which = worst(wrong, wanted)
                assert (off > 1, which) == (True, name), f"{name}[{at}]"


@pytest.mark.parametrize("check", cases.tiny(), ids=str)
def test_a_changed_problem_fits_the_same_buffers(check: Check) -> None:
    make_one = cases.OPERATIONS[check.op].make
    one, other = make_one(check, 1, "cpu", False), make_one(check, 2, "cpu", True)
    assert {n: (b.shape, b.dtype) for n, b in one.buffers.items()} == {
        n: (b.shape, b.dtype) for n, b in other.buffers.items()
    }
    assert any(not bits(b).equal(bits(other.buffers[n])) for n, b in one.buffers.items())
    again = make_one(check, 1, "cpu", False)
    assert all(bits(b).equal(bits(again.buffers[n])) for n, b in one.buffers.items())
    if not cases.OPERATIONS[check.op].captured:
        return
    for problem in (one, other):
        for argument in problem.arguments(problem.buffers):
            if isinstance(argument, torch.Tensor):
                owners = [b.untyped_storage().data_ptr() for b in problem.buffers.values()]
                assert argument.untyped_storage().data_ptr() in owners, "a copy would not follow a replay"


def test_lengths_change() -> None:
    check = Check("paged_attention", BF16, BF16, Case(((3, 90), (1, 200), (1, 0)), 4, 2))
    one, other = (cases.OPERATIONS[check.op].make(check, seed, "cpu", seed > 1) for seed in (1, 2))
    assert one.buffers["seq_lens"].tolist() == [90, 200, 0]
    lengths = other.buffers["seq_lens"].tolist()
    assert 3 <= lengths[0] <= 90 and 1 <= lengths[1] < 200 and lengths[2] == 0


def test_distance() -> None:
    want = Want(torch.tensor([1.0, -2.0, math.inf, math.nan], dtype=torch.float64), 0.1, 0.1)
    assert distance(torch.tensor([1.1, -2.0, math.inf, math.nan]), want) == pytest.approx(0.5, rel=1e-5)
    assert distance(torch.tensor([1.0, -2.0, math.nan, math.nan]), want) == math.inf
    assert distance(torch.tensor([1.0, -2.0, math.inf, 0.0]), want) == math.inf
    assert distance(torch.tensor([1.0, -2.0, 5.0, math.nan]), want) == math.inf
    assert distance(torch.zeros(3), want) == math.inf
    assert distance(torch.zeros(0), Want(torch.zeros(0))) == 0
    assert distance(torch.tensor([-0.0]), Want(torch.tensor([0.0]))) == math.inf, "bits are compared"


@pytest.mark.parametrize("window", [None, 1, 5, 40, 1000])
def test_cost_of_attention(window: int | None) -> None:
    rows = ((1, 1), (3, 17), (10, 10), (0, 4), (1, 100))
    case = Case(rows, 6, 2, 64, window=window)
    check = Check("paged_attention", BF16, "float8_e5m2", case)
    pairs = keys = 0
    for count, length in rows:
        seen = set()
        for position in range(length - count, length):
            visible = range(max(0, position - (window or length) + 1), position + 1)
            pairs += len(visible)
            seen |= set(visible)
        keys += len(seen)
    cost = cases.OPERATIONS["paged_attention"].cost(check)
    assert cost.flops == 4 * pairs * 6 * 64
    assert cost.bytes == 2 * 15 * 6 * 64 * 2 + 2 * keys * 2 * 64


def test_cost_of_rows_and_stores() -> None:
    cost = {name: operation.cost for name, operation in cases.OPERATIONS.items()}
    assert cost["rms_norm"](Check("rms_norm", BF16, None, Rows(3, 10, heads=2))).bytes == 3 * 20 * 2 * 2
    assert cost["gated"](Check("gated", "float32", None, Rows(3, 10, activation="silu"))).bytes == 3 * 30 * 4
    stored = Check("rope_and_store", BF16, "float8_e5m2", Step(7, 4, 2, 64, 64))
    assert cost["rope_and_store"](stored).bytes == 7 * 64 * (2 * 4 * 2 + 2 * 2 * (2 + 1))


@pytest.mark.parametrize("check", [*firsts_of_each_op()], ids=str)
def test_library_routes_do_the_same_work(check: Check) -> None:
    """Where a route returns its result."""
    problem = cases.OPERATIONS[check.op].make(check, 3, "cpu", False)
    wanted = problem.expected()
    for name, route in problem.peers.items():
        got: Any = route(problem.buffers)()
        if got is None or check.op == "paged_attention":
            continue
        if isinstance(got, torch.Tensor):
            got = (got,)
        want = wanted.get("out") or wanted["logprob"]
        torch.testing.assert_close(got[0].double(), want.value.double(), atol=0.03, rtol=0.03, msg=name)


@pytest.mark.parametrize("rows", [((1, 70),) * 3, ((40, 40),) * 2, ((9, 33),) * 2], ids=str)
def test_dense_attention_does_the_same_work(rows: tuple[tuple[int, int], ...]) -> None:
    check = Check("paged_attention", BF16, BF16, Case(rows, 4, 2))
    problem = cases.OPERATIONS[check.op].make(check, 3, "cpu", False)
    got = problem.peers["torch SDPA, contiguous keys"](problem.buffers)()
    want = problem.expected()["out"].value
    torch.testing.assert_close(got.transpose(1, 2).flatten(0, 1).double(), want, atol=0.03, rtol=0.03)


def test_torch_stores_what_is_expected() -> None:
    for cached in (BF16, "float8_e4m3fn"):
        for op in ("store_kv", "rope_and_store"):
            problem = cases.OPERATIONS[op].make(
                Check(op, BF16, cached, Step(19, 4, 2, 64, 64)), 3, "cpu", False
            )
            wanted = problem.expected()
            for route in problem.peers.values():
                route(problem.buffers)()
            assert distance(problem.buffers["v_cache"], wanted["v_cache"]) <= 1


def test_expectations_are_committed() -> None:
    assert timed.EXPECTATIONS.read_text() == timed.render(), "run: python -m aserve.gpu_check.timed"
    assert len(json.loads(timed.render())) == len(timed.TIMED), "two shapes of one name"
    # A swap takes what its link takes, which is not known here.
    assert {check.op for check in timed.TIMED} == set(cases.OPERATIONS) - {"swap_blocks"}
    largest = max(timed.TIMED, key=timed.predicted)
    assert timed.predicted(largest) == pytest.approx(716.18, abs=0.01)


def test_every_operation_has_shapes() -> None:
    from aserve.ops.hardware import BOUND

    assert set(cases.OPERATIONS) == set(BOUND)
    assert {check.op for check in cases.tiny()} == set(BOUND)


def test_what_exact_says_of_a_row_without_keys() -> None:
    batch = make(Case(((1, 0), (1, 3)), 2, 1), torch.float32)
    out = exact(batch)
    assert (out[0] == 0).all() and (out[1] != 0).any()


def test_recordings_follow_their_inputs() -> None:
    x, out = torch.ones(3), torch.empty(3)
    replay = record(lambda: out.copy_((x * 2)[1:].sum() + x))
    assert out.tolist() == [5, 5, 5]
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    replay()
    assert out.tolist() == [11, 12, 13]


def test_recordings_refuse_reading_on_the_host() -> None:
    x = torch.ones(3)
    for reads in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero()):
        with pytest.raises(RuntimeError, match="not permitted when a stream is capturing"):
            record(reads)
