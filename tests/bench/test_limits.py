from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aserve.bench import cli, limits
from aserve.errors import ConfigError
from aserve.ops import native

needs_extension = pytest.mark.skipif(native.why_missing() is not None, reason="the extension is not built")


def test_memory_is_counted_once() -> None:
    base = torch.zeros(1000, dtype=torch.float32)
    start = base.data_ptr()
    assert limits.memory_of([base[:10], base[500:600]]) == [(start, 40), (start + 2000, 400)]
    assert limits.memory_of([base, base[5:50], base]) == [(start, 4000)]
    assert limits.memory_of([base[:10], base[10:20]]) == [(start, 80)]
    assert limits.memory_of([]) == []


@needs_extension
def test_rates_are_of_this_world() -> None:
    """A plausible range: a unit mistaken by 1000 would leave it."""
    tensors = [torch.ones(3 << 20, dtype=torch.uint8), torch.ones(1 << 20, dtype=torch.float32)]
    assert 1e8 < limits.read_rate(tensors, 1) < 1e13
    assert 1e8 < limits.read_rate(tensors, 2, cold=True, repeats=2) < 1e12
    rate = limits.peaks(1)
    assert list(rate) == list(limits.PEAKS)
    assert 0.1 < rate["fp32 FMA"] < 1e5
    assert 0.1 < rate["int8 dot"] < 1e6
    assert 0 <= rate["bf16 dot"] < 1e6


@needs_extension
def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"threads": 1, "read_gb_per_s": {"16 MiB": 12.34}, "peak_gop_per_s": {"fp32 FMA": 56.7}}
    monkeypatch.setattr(limits, "machine", lambda threads: found | {"threads": threads})
    out = tmp_path / "limits.json"
    assert cli.main(["limits", "--threads", "3", "--output-json", str(out)]) == 0
    assert json.loads(out.read_text()) == found | {"threads": 3}
    shown = capsys.readouterr().out
    assert "read 16 MiB (GB/s):" in shown and "12.3" in shown
    assert cli.main(["limits", "--threads", "0"]) == 2


def test_nothing_to_read_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to read"):
        limits.read_rate([], 1)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native, "why_missing", lambda: "it has not been built")
    assert cli.main(["limits"]) == 2
    assert "it has not been built" in capsys.readouterr().err
