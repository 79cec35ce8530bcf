"""The guard itself, and (slow) what it guards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.guard import engine, measure


def test_a_count_may_grow_by_the_margin_and_no_more() -> None:
    figures = {"avx2: a": 1000, "avx2: b": 1000, "engine": 1000}
    fine = {"avx2: a": 1000 * measure.MARGIN, "avx2: b": 10, "engine": 1000}
    assert measure.compare(fine, figures) == []  # type: ignore[arg-type]
    (problem,) = measure.compare(figures | {"engine": 1051}, figures)
    assert problem.startswith("engine: 1051 instructions, +5.1% of 1000")


def test_a_case_cannot_vanish_or_appear_unseen() -> None:
    figures = {"avx2: a": 5, "avx2: b": 5, "avx512: a": 5}
    assert measure.compare({"avx2: a": 5}, figures) == ["avx2: b: has a figure and is no longer counted"]
    new = measure.compare({"avx2: a": 5, "avx2: b": 5, "avx2: c": 5}, figures)
    assert new == ["avx2: c: counted, but has no figure"]


def test_the_workload_produces_what_is_divided_by(tmp_path: Path) -> None:
    built = engine.build(tmp_path)
    assert engine.work(built, "x", 5) == engine.REQUESTS * 5
    assert built.core.blocks.pool.usage == 0
    built.close()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["kernels", "python"])
def test_instructions(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["measure", "--only", kind])
    status = measure.main()
    shown = capsys.readouterr()
    if status == measure.CANNOT_COUNT:
        pytest.skip(shown.err)
    assert status == 0, shown.err
