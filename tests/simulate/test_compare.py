"""Comparisons, the search for saturation, and the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from aserve.errors import ConfigError
from aserve.server import cli
from aserve.simulate import compare, policy
from aserve.simulate.device import PRESETS
from aserve.simulate.report import METRICS, block, summary
from aserve.simulate.trace import Lengths, TraceSpec

SMALL = ["--num-prompts", "40", "--input-len", "200", "--output-len", "uniform:5:40", "--request-rate", "20"]


def scenario(**more) -> compare.Scenario:
    spec = TraceSpec(Lengths.parse("2000", "input_len"), Lengths.parse("20", "output_len"), 60, rate=5.0)
    return compare.Scenario(PRESETS["h100-8b"], spec, **more)


def test_the_grid_is_every_combination() -> None:
    choices = [policy.parse_choice(text) for text in ("overlap=0,1", "max_num_seqs=4,8,16")]
    found = compare.grid(choices)
    assert len(found) == 6
    assert {"overlap": 1, "max_num_seqs": 16} in found
    assert compare.grid([]) == [{}]


def test_processes_give_the_results_of_one_process() -> None:
    scenarios = [scenario(chosen={"max_num_seqs": count}) for count in (1, 4)]
    alone = compare.summarise_all(scenarios, jobs=1)
    assert compare.summarise_all(scenarios, jobs=2) == alone
    assert alone[0]["mean_e2el_ms"] > alone[1]["mean_e2el_ms"]


def test_saturation_lies_where_the_limits_stop_holding() -> None:
    found = compare.find_saturation(scenario(goodput={"ttft": 400.0}), share=0.9)
    assert found.rate is not None and 0.2 * found.capacity < found.rate < 1.2 * found.capacity
    assert found.rates == sorted(found.rates)
    at = dict(zip(found.rates, found.results, strict=True))
    assert at[found.rate]["attainment"] >= 0.9
    above = min(rate for rate in found.rates if rate > found.rate)
    assert at[above]["attainment"] < 0.9
    assert above - found.rate <= 0.02 * found.capacity


def test_the_capacity_leaves_filling_and_draining_out() -> None:
    base = scenario(chosen={"max_num_seqs": 8})
    run = compare.simulate(base.at_rate(math.inf))
    assert compare.steady_throughput(run) > summary(run, {})["request_throughput"]
    run.outcomes = run.outcomes[:9]
    with pytest.raises(ConfigError, match="too few"):
        compare.steady_throughput(run)


def test_no_rate_keeps_limits_that_are_too_tight() -> None:
    assert compare.find_saturation(scenario(goodput={"ttft": 0.001}), tolerance=0.2).rate is None
    assert compare.find_saturation(scenario()).rate is None


def test_the_summary_counts_what_the_limits_say() -> None:
    run = compare.simulate(scenario())
    limit = sorted(outcome.ttft for outcome in run.outcomes)[29] * 1000 + 1e-9
    result = summary(run, {"ttft": limit})
    assert result["attainment"] == 0.5
    assert result["request_goodput"] == pytest.approx(30 / run.seconds)
    assert result["p50_itl_ms"] == pytest.approx(result["median_itl_ms"])
    assert result["total_output_tokens"] == 60 * 20
    text = block(result, {"ttft": limit}, rate=5.0)
    for title, short in METRICS.values():
        assert title in text and f"P99 {short} (ms):" in text
    assert all(len(line) <= 60 for line in text.splitlines())


def test_one_simulation_prints_the_block_and_saves_figures(tmp_path, capsys) -> None:
    path = tmp_path / "result.json"
    argv = ["simulate", *SMALL, "--goodput", "ttft:500", "--output-json", str(path), "--save-detailed"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "Simulated Serving Result" in shown and "Successful requests:                     40" in shown
    saved = json.loads(path.read_text())
    assert saved["completed"] == 40 and len(saved["requests"]) == 40
    assert saved["limits"]["max_num_batched_tokens"] == 512
    assert max(saved["timeline"]["kv_usage"]) == saved["peak_kv_usage"] > 0
    assert saved["p99_ttft_ms"] >= saved["p50_ttft_ms"] > 0


def test_a_comparison_prints_a_line_per_choice(tmp_path, capsys) -> None:
    path = tmp_path / "result.json"
    argv = ["simulate", *SMALL, "--jobs", "1", "--output-json", str(path)]
    assert cli.main([*argv, "--compare", "chunked_prefill=on,off", "--sweep", "5,50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["chunked_prefill", "rate"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["on", "5"],
        ["on", "50"],
        ["off", "5"],
        ["off", "50"],
    ]
    runs = json.loads(path.read_text())["runs"]
    assert runs[3]["choices"] == {"chunked_prefill": False, "rate": 50.0}


def test_what_the_engine_would_refuse_is_left_out(capsys) -> None:
    argv = ["simulate", *SMALL, "--jobs", "1", "--compare", "chunked_prefill=on,off"]
    assert cli.main([*argv, "max_num_batched_tokens=512,4096"]) == 0
    shown = capsys.readouterr()
    assert [line.split()[:2] for line in shown.out.splitlines()[1:]] == [["on", "512"], ["on", "4096"]]
    assert shown.err.count("left out: ") == 2
    assert cli.main([*argv, "max_num_batched_tokens=512,4096", "--max-model-len", "4000"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert cli.main(["simulate", *SMALL, "--compare", "overlap=2"]) == 2


def test_the_search_says_what_it_found(capsys) -> None:
    assert cli.main(["simulate", *SMALL, "--jobs", "1", "--sweep", "auto", "--goodput", "ttft:100"]) == 0
    assert "requests keep within the limits up to" in capsys.readouterr().out
    assert cli.main(["simulate", *SMALL, "--jobs", "1", "--sweep", "auto"]) == 0
    assert "give --goodput" in capsys.readouterr().out


def test_a_file_replaces_the_drawn_trace(tmp_path, capsys) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"arrival": 1, "prompt_tokens": 9, "output_tokens": 4}\n' * 3)
    assert cli.main(["simulate", "--trace", str(path), "--device", "cpu-smollm2"]) == 0
    assert "Total generated tokens:                  12" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["--device", "none"],
        ["--input-len", "x"],
        ["--compare", "colour=red"],
        ["--sweep", "fast"],
        ["--goodput", "ttft"],
        ["--request-rate", "-1"],
        ["--max-concurrency", "0"],
        ["--attainment", "2"],
        ["--priorities", "a"],
        ["--save-detailed"],
        ["--trace", "/none"],
        ["--max-num-batched-tokens", "3"],
    ],
)
def test_settings_that_cannot_work_end_with_status_2(argv: list[str], capsys) -> None:
    assert cli.main(["simulate", *argv]) == 2
    assert "aserve simulate: " in capsys.readouterr().err


def test_the_device_can_be_shown(capsys) -> None:
    assert cli.main(["simulate", "--device", "h100x4-70b", "--show-device"]) == 0
    assert json.loads(capsys.readouterr().out)["device"]["count"] == 4


def test_it_loads_no_torch() -> None:
    code = (
        "import sys, aserve.simulate.cli; sys.exit(any(n in sys.modules for n in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
