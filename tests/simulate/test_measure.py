"""The measuring script, on a tiny model: what it writes, not how long things took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aserve.simulate import measure
from aserve.simulate.calibrate import read_steps
from tests import tiny_checkpoint

ENGINE = ["--dtype", "float32", "--enable-chunked-prefill", "--max-num-seqs", "8", "--block-size", "8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("model"), weights=True)


def test_steps_and_then_a_replay(model: Path, tmp_path, capsys, monkeypatch) -> None:
    path = tmp_path / "steps.json"
    argv = ["steps", "--output-json", str(path), "--batches", "1,3", "--contexts", "5,60", "--repeats", "1"]
    assert measure.main([*argv, "--weight-bytes", "4", "--model", str(model), *ENGINE]) == 0
    measured = read_steps(str(path))
    assert measured.model is not None
    assert (measured.model.layers, measured.model.kv_heads, measured.model.kv_bytes) == (2, 2, 4.0)
    kinds = {(step.tokens, step.samples, step.rows): step for step in measured.steps}
    # One prompt of 60; three of 60 in one step of 180 tokens; a decode of three.
    assert kinds[(60, 1, 1)].pairs == 60 * 61 / 2 and kinds[(60, 1, 1)].context == 60
    assert kinds[(180, 3, 3)].pairs == 3 * 60 * 61 / 2
    assert kinds[(3, 3, 3)].seconds > 0
    assert all(step.host_seconds is not None and step.host_seconds > 0 for step in measured.steps)

    result = tmp_path / "result.json"
    argv = ["replay", "--steps", str(path), "--num-prompts", "6", "--request-rate", "50", "--output-len", "7"]
    argv += ["--input-len", "uniform:3:40", "--output-json", str(result), "--model", str(model), *ENGINE]
    assert measure.main(argv) == 0
    assert "simulator" in capsys.readouterr().out
    found = json.loads(result.read_text())
    for each in found.values():
        assert (each["completed"], each["total_output_tokens"]) == (6, 42)
        assert each["p99_ttft_ms"] > 0
    assert found["engine"]["total_input_tokens"] == found["simulator"]["total_input_tokens"]


def test_wrong_counts_end_with_status_2(capsys) -> None:
    assert measure.main(["steps", "--output-json", "x", "--batches", "0"]) == 2
    assert "batches" in capsys.readouterr().err
