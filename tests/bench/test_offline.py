"""The commands that run an engine in this process, over a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from aserve.bench import cli
from tests import tiny_checkpoint


@pytest.fixture(scope="module")
def engine_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"), weights=True)
    return ["--model", str(folder), "--dtype", "float32", "--disable-log-stats"]


def test_throughput(engine_flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    flags = ["--input-len", "9", "--output-len", "4", "--num-prompts", "5", "--n", "2"]
    assert cli.main(["throughput", *engine_flags, *flags, "--output-json", str(out)]) == 0
    shown = capsys.readouterr().out
    found = re.search(r"Throughput: ([\d.]+) requests/s, ([\d.]+) total tokens/s, ([\d.]+) output", shown)
    assert found is not None
    assert re.search(r"prompt tokens: +45$", shown, re.MULTILINE)
    assert re.search(r"output tokens: +40$", shown, re.MULTILINE)
    saved = json.loads(out.read_text())
    assert (saved["num_requests"], saved["total_num_tokens"]) == (5, 85)
    assert saved["requests_per_second"] == pytest.approx(5 / saved["elapsed_time"])
    assert float(found[3]) == pytest.approx(40 / saved["elapsed_time"], rel=0.01)


def test_latency(engine_flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    flags = ["--input-len", "5", "--output-len", "3", "--batch-size", "2"]
    iterations = ["--num-iters-warmup", "0", "--num-iters", "4", "--output-json", str(out)]
    assert cli.main(["latency", *engine_flags, *flags, *iterations]) == 0
    shown = capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert len(saved["latencies"]) == 4
    assert saved["avg_latency"] == pytest.approx(sum(saved["latencies"]) / 4)
    assert f"Avg latency: {saved['avg_latency']} seconds" in shown
    assert re.findall(r"^(\d+)% percentile latency", shown, re.MULTILINE) == list(saved["percentiles"])


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("throughput", ["--input-len", "120", "--output-len", "20"], "exceed the model's"),
        ("throughput", ["--num-prompts", "0"], "at least 1"),
        ("latency", ["--batch-size", "0"], "at least 1"),
        ("latency", ["--num-iters-warmup", "-1"], "at least 0"),
        ("latency", ["--dtype", "float32", "--max-model-len", "1000000"], "max_model_len"),
    ],
)
def test_settings_that_cannot_work(
    engine_flags: list[str],
    command: str,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([command, *engine_flags, *flags]) == 2
    assert message in capsys.readouterr().err
