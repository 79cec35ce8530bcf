"""The whole command on the CPU, and that it would notice broken kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aserve.errors import ConfigError
from aserve.gpu_check import cases, cli, plan, table
from aserve.gpu_check.options import Options
from aserve.gpu_check.paging import Case
from aserve.gpu_check.phases import correctness, graphs, timings
from aserve.gpu_check.problems.base import Check
from aserve.gpu_check.problems.rows import Rows
from aserve.gpu_check.results import Results, Row
from aserve.ops import hardware, native
from aserve.ops.hardware import Combination

ABOUT: Row = {
    "device": "NVIDIA H100",
    "capability": [9, 0],
    "date": "2026-01-02",
    "sources": "abc",
    "commit": "c",
}
STAND_IN = """#!/bin/sh
[ "$1" = --tool ] || exit 64
shift 4
"$@"
status=$?
echo "========= ERROR SUMMARY: 0 errors"
exit $status
"""


def cli_run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aserve", "gpu-check", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


@pytest.mark.timeout(600)
def test_dry_run(library: Path, tmp_path: Path) -> None:
    """Every phase runs, every operation is seen in each, and nothing counts as verified on hardware."""
    if native.why_missing() is not None:
        pytest.skip(f"no CPU library, which defines the schemas: {native.why_missing()}")
    stand_in = tmp_path / "compute-sanitizer"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    output = tmp_path / "results" / "results.jsonl"
    done = cli_run(
        *("--dry-run", "--seconds", "5000", "--output", str(output), "--commit", "abcdef"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(done.stdout.encode()) <= table.LIMIT + 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("DRY RUN")
    assert lines[-1].endswith(" passed, 0 failed")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(row["kind"].startswith("dry ") and row["commit"] == "abcdef" for row in rows)
    assert hardware.read(output.read_text().splitlines()) == []
    ops = set(cases.OPERATIONS)
    of = {
        kind: [r for r in rows if r["kind"] == f"dry {kind}"] for kind in ("correctness", "graph", "timing")
    }
    assert {Combination(r["op"], r["dtype"], r["cache_dtype"]) for r in of["correctness"]} == set(
        hardware.combinations()
    )
    assert {r["op"] for r in of["timing"]} == ops
    assert {r["op"] for r in of["graph"]} == {op for op in ops if cases.OPERATIONS[op].captured}
    assert all(r["passed"] for kind in ("correctness", "graph") for r in of[kind])
    ended = {r["name"]: r for r in rows if r["kind"] == "dry phase"}
    assert tuple(ended) == plan.NAMES
    assert not any(r["left_out"] for r in ended.values())
    end_to_end = [r for r in rows if r["kind"] == "dry end_to_end"]
    assert len([r for r in end_to_end if r.get("passed")]) == 8
    assert len([r for r in end_to_end if "tokens_per_second" in r or "step_ms" in r]) == 8
    checked = {(r["name"], op) for r in rows if r["kind"] == "dry sanitizer" for op in r["op"].split(",")}
    assert checked == {("memcheck", op) for op in ops}


def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = cli_run("--only", "environment")
    assert done.returncode == 2
    assert done.stdout == ""
    wanted = "aserve gpu-check: gpu-check needs a CUDA device, and torch finds none here; use --dry-run\n"
    assert done.stderr == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "only: unknown 'speed'; known: environment, correctness"),
        (["--op", "softmax"], "op: unknown 'softmax'; known: rms_norm"),
        (["--seconds", "0"], "seconds must be above 0, got 0"),
        (["--seed", "-1"], "seed must not be negative"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        Results(tmp_path / "file" / "results.jsonl", ABOUT, False)


class Machine:
    """The emulated kernels, some of them replaced."""

    dry, device, l2 = True, "cpu", 1 << 12

    def __init__(self, ops: Any) -> None:
        self.ops = ops

    def wait(self) -> None:
        pass

    def capture(self, call: Any) -> Any:
        from aserve.gpu_check.recording import record

        call()
        return record(call)

    def seconds(self, call: Any) -> float:
        call()
        return 1e-3


class Ops:
    def __init__(self, sound: Any, **replaced: Any) -> None:
        self._sound, self._replaced = sound, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name) or getattr(self._sound, name)


NORM = Check("rms_norm", "bfloat16", None, Rows(3, 64))
ATTENTION = Check("paged_attention", "bfloat16", "bfloat16", Case(((1, 60), (1, 33)), 4, 2))


def test_broken_kernels_fail(bound: Any) -> None:
    def forgets_a_row(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        bound.rms_norm(x[:-1], weight, eps, out[:-1])

    def ignores_eps(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        bound.rms_norm(x, weight, eps + 0.1, out)

    for broken in (forgets_a_row, ignores_eps):
        assert not correctness.finding(Machine(Ops(bound, rms_norm=broken)), NORM, 1)["passed"]
    found = correctness.finding(Machine(Ops(bound)), NORM, 1)
    assert found["passed"] and 0 < found["off"] <= 1


def test_what_a_capture_forbids_fails(bound: Any) -> None:
    first: list[Any] = []

    def keeps_the_first_lengths(*arguments: Any) -> None:
        if not first:
            first.extend(arguments[4].clone() if at == 4 else None for at in range(5))
        bound.paged_attention(*arguments[:4], first[4], *arguments[5:])

    found = graphs.finding(Machine(Ops(bound, paged_attention=keeps_the_first_lengths)), ATTENTION, 1)
    assert not found["passed"], "lengths must be read at every replay"

    def asks_the_host(*arguments: Any) -> None:
        assert int(arguments[4].max()) > 0
        bound.paged_attention(*arguments)

    with pytest.raises(RuntimeError, match="capturing"):
        graphs.finding(Machine(Ops(bound, paged_attention=asks_the_host)), ATTENTION, 1)
    assert graphs.finding(Machine(Ops(bound)), ATTENTION, 1)["passed"]


def test_timings_hold_a_call_against_what_it_could_take(bound: Any) -> None:
    options = Options(True, 1, ceilings={"copy, bytes/s": 1e9})
    row = timings.finding(Machine(Ops(bound)), NORM, options)
    assert row["microseconds"] == 50.0, "20 calls in a millisecond"
    assert row["rate"] == 2 * 3 * 64 * 2 / 50e-6
    assert row["share_of_ceiling"] == pytest.approx(row["rate"] / 1e9, abs=1e-4)
    assert row["ratio_to_expected"] == pytest.approx(50 / (768 / 3e12 * 1e6), rel=1e-3)
    assert row["peers"] == {"torch rms_norm": {"microseconds": 50.0}}


def test_a_gpus_rows_verify_its_kernels(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = Results(path, ABOUT, False)
    row = correctness.about("correctness", ATTENTION)
    results.put({**row, "passed": True, "off": None, "seed": 3})
    results.put({**correctness.about("correctness", NORM), "passed": False, "error": "RuntimeError: no"})
    results.put({"kind": "phase", "name": "correctness", "seconds": float("nan")})
    assert path.read_text().count("\n") == 3, "each row is there at once"
    assert json.loads(path.read_text().splitlines()[-1])["seconds"] is None
    found = hardware.read(path.read_text().splitlines())
    what = Combination("paged_attention", "bfloat16", "bfloat16")
    assert hardware.verified(what, 9, "abc", found)
    assert not hardware.verified(Combination("rms_norm", "bfloat16"), 9, "abc", found)
    assert (
        "| `paged_attention` | bfloat16 | bfloat16 | verified, NVIDIA H100, 2026-01-02 |"
        in hardware.render("abc", found)
    )
    results.close()


def test_every_row_of_the_list_is_one_the_table_knows() -> None:
    known = set(hardware.combinations())
    assert all(cases.combination(check) in known for check in cases.every())


ABSENT = """
import sys
absent = "gguf quart hypercorn orjson pydantic sse_starlette llguidance transformers anyio"
sys.modules |= dict.fromkeys(absent.split())
from aserve.server.cli import main
sys.exit(main(["gpu-check", "--dry-run", *sys.argv[1:]]))
"""


@pytest.mark.timeout(300)
def test_the_kernels_need_no_package_but_torch(library: Path, tmp_path: Path) -> None:
    """A GPU at hand for minutes may lack the server's dependencies."""
    if native.why_missing() is not None:
        pytest.skip(f"no CPU library, which defines the schemas: {native.why_missing()}")
    output = tmp_path / "results.jsonl"
    phases = "environment,correctness,graphs,ceilings,timings"
    arguments = ("--only", phases, "--op", "rms_norm", "--output", str(output), "--seconds", "5000")
    done = subprocess.run(
        [sys.executable, "-c", ABSENT, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["kind"] for row in rows if row.get("passed")} == {
        f"dry {kind}" for kind in ("environment", "correctness", "graph")
    }


def test_a_run_that_is_cut_has_not_passed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left: list[str] = []
    monkeypatch.setattr("aserve.gpu_check.children.ask", lambda question, seconds: dict(ABOUT))
    monkeypatch.setattr(plan, "run", lambda *arguments: left)
    arguments = ["--output", str(tmp_path / "results.jsonl"), "--seconds", "1"]
    assert cli.main(arguments) == 0
    left.append("graphs: last")
    assert cli.main(arguments) == 1


def test_phases_get_what_they_need() -> None:
    names = [[phase.name for phase in plan.chosen(only)] for only in ((), ("timings",), ("graphs",))]
    assert names == [list(plan.NAMES), ["ceilings", "timings"], ["graphs"]]
    assert sum(phase.share for phase in plan.PHASES) <= 540


def test_time_that_a_phase_leaves_goes_to_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from aserve.gpu_check import children

    clock, limits = [1000.0], []

    def run(units: Any, opened: Any, until: float, put: Any) -> children.Outcome:
        limits.append(until - clock[0])
        clock[0] += 10
        return children.Outcome(1, [] if len(limits) < 3 else ["slow"])

    monkeypatch.setattr(plan.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(children, "run", run)
    phases = [
        plan.Phase(name, share, lambda options: []) for name, share in (("a", 10), ("b", 50), ("c", 40))
    ]
    results = Results(tmp_path / "results.jsonl", ABOUT, False)
    left = plan.run(phases, Options(False, 1), 1200.0, lambda: None, results)  # type: ignore[arg-type, return-value]
    assert limits == [20.0, 110.0, 180.0]
    assert left == ["c: slow"]
    results.close()


def test_the_closing_table_is_short_and_keeps_its_end() -> None:
    rows: list[Row] = [
        {**correctness.about("correctness", check), "passed": at % 3 > 0, "error": "x" * 300}
        for at, check in enumerate(cases.every())
    ]
    rows += [
        {
            **correctness.about("timing", ATTENTION),
            "name": f"paged_attention number {at}",
            "microseconds": 1.0,
            "bound": "bytes",
            "rate": 1e12,
            "share_of_ceiling": 0.5,
            "ratio_to_expected": 1.0,
            "peers": {},
            "goal_met": False,
        }
        for at in range(200)
    ]
    rows.append({"kind": "phase", "name": "timings", "seconds": 3.0, "left_out": 2})
    text = table.render(ABOUT, rows, ["timings: last"])
    assert len(text.encode()) <= 9000
    failed = sum(row.get("passed") is False for row in rows)
    assert (
        text.splitlines()[-1] == f"{sum(row.get('passed') is True for row in rows)} passed, {failed} failed"
    )
    assert "... more in the file" in text
    assert "timings 3 cut" in text
    assert "GOAL MISSED" in text
