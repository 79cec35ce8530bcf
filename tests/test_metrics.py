from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aserve import log
from aserve.config.engine import EngineConfig
from aserve.engine.stats import EngineStats
from aserve.engine.watch import watch_loop_lag
from aserve.metrics import Metrics, one_two_five

MODEL = {"model_name": "first"}

BUCKETS = {
    "vllm:time_to_first_token_seconds": (
        "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 +Inf"
    ),
    "vllm:time_per_output_token_seconds": "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 +Inf",
    "vllm:e2e_request_latency_seconds": "1.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 +Inf",
    "vllm:request_prompt_tokens": "1.0 2.0 5.0 10.0 20.0 50.0 100.0 200.0 500.0 1000.0 2000.0 +Inf",
    "vllm:request_generation_tokens": "1.0 2.0 5.0 10.0 20.0 50.0 100.0 200.0 500.0 1000.0 2000.0 +Inf",
    "vllm:request_params_best_of": "1.0 2.0 5.0 10.0 20.0 +Inf",
    "vllm:request_queue_time_seconds": (
        "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 +Inf"
    ),
    "vllm:request_params_n": "1.0 2.0 5.0 10.0 20.0 +Inf",
}
GAUGES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_swapped",
    "vllm:gpu_cache_usage_perc",
    "vllm:cpu_cache_usage_perc",
    "vllm:avg_prompt_throughput_toks_per_s",
    "vllm:avg_generation_throughput_toks_per_s",
    "aserve:event_loop_tasks",
    "process_resident_memory_bytes",
    "process_open_fds",
]
COUNTERS = [
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "aserve:requests_total",
    "aserve:requests_aborted_total",
    "aserve:requests_rejected_total",
    "aserve:requests_failed_total",
    "aserve:http_errors_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
]


def config(max_model_len: int = 2048) -> EngineConfig:
    made = SimpleNamespace(
        model=SimpleNamespace(
            served_model_name=["first", "second"], max_model_len=max_model_len, sliding_window=None
        ),
        cache=SimpleNamespace(
            block_size=16,
            gpu_memory_utilization=0.9,
            swap_space_bytes=4 << 30,
            num_gpu_blocks_override=None,
            cache_dtype="auto",
            enable_prefix_caching=False,
        ),
    )
    return cast(EngineConfig, made)


def samples(stats: EngineStats) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = stats.render().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(stats: EngineStats, name: str, **labels: str) -> float:
    return samples(stats)[name, frozenset((MODEL | labels).items())]


def step(stats: EngineStats, now: float, **changes: Any) -> None:
    numbers: dict[str, Any] = {
        "running": 0,
        "waiting": 0,
        "swapped": 0,
        "gpu_cache_usage": 0.0,
        "cpu_cache_usage": 0.0,
        "prompt_tokens": 0,
        "generation_tokens": 0,
        "preemptions": 0,
    }
    stats.on_step(now=now, **(numbers | changes))


def test_every_series_has_its_name_type_labels_and_buckets() -> None:
    stats = EngineStats(config(), enabled=True, num_gpu_blocks=7, num_cpu_blocks=3)
    text = stats.render().decode()
    types = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    for name in GAUGES:
        assert types[name] == "gauge"
    for name in COUNTERS:
        assert types[name] == "counter"
    for name, bounds in BUCKETS.items():
        assert types[name] == "histogram"
        found = [
            dict(labels)["le"]
            for (sample, labels), _ in samples(stats).items()
            if sample == name + "_bucket" and ("model_name", "first") in labels
        ]
        assert found == bounds.split()
    assert "_created" not in text
    info = [labels for (name, labels), v in samples(stats).items() if name == "vllm:cache_config_info"]
    assert [dict(labels) for labels in info] == [
        {
            "block_size": "16",
            "gpu_memory_utilization": "0.9",
            "swap_space_bytes": str(4 << 30),
            "num_gpu_blocks_override": "None",
            "cache_dtype": "auto",
            "sliding_window": "None",
            "enable_prefix_caching": "False",
            "num_gpu_blocks": "7",
            "num_cpu_blocks": "3",
        }
    ]
    for name, labels in samples(stats):
        if name != "vllm:cache_config_info" and not name.startswith("process_"):
            assert dict(labels)["model_name"] == "first"


def test_capacity_learned_later_replaces_the_first() -> None:
    stats = EngineStats(config(), enabled=True)
    stats.set_capacity(11, 5)
    text = stats.render().decode()
    assert text.count("vllm:cache_config_info{") == 1
    assert 'num_gpu_blocks="11"' in text


def test_steps_set_gauges_and_add_to_counters() -> None:
    stats = EngineStats(config(), enabled=True)
    step(
        stats,
        0.0,
        running=2,
        waiting=3,
        swapped=1,
        gpu_cache_usage=0.25,
        cpu_cache_usage=0.5,
        prompt_tokens=9,
    )
    step(stats, 0.1, running=1, gpu_cache_usage=0.125, generation_tokens=4, preemptions=2)
    step(stats, 0.2, running=1, generation_tokens=3, preemptions=1, prompt_tokens=1)
    assert value(stats, "vllm:num_requests_running") == 1
    assert value(stats, "vllm:num_requests_waiting") == 0
    assert value(stats, "vllm:gpu_cache_usage_perc") == 0
    assert value(stats, "vllm:prompt_tokens_total") == 10
    assert value(stats, "vllm:generation_tokens_total") == 7
    assert value(stats, "vllm:num_preemptions_total") == 3


def test_histograms_count_on_their_bounds() -> None:
    stats = EngineStats(config(), enabled=True)
    for seconds in (0.001, 0.0011, 10.0, 11.0):
        stats.on_first_token(seconds)
    name = "vllm:time_to_first_token_seconds"
    assert value(stats, name + "_bucket", le="0.001") == 1
    assert value(stats, name + "_bucket", le="0.005") == 2
    assert value(stats, name + "_bucket", le="10.0") == 3
    assert value(stats, name + "_bucket", le="+Inf") == 4
    assert value(stats, name + "_count") == 4
    assert value(stats, name + "_sum") == pytest.approx(21.0021)
    stats.on_output_token(0.02)
    assert value(stats, "vllm:time_per_output_token_seconds_count") == 1


def test_finished_requests() -> None:
    stats = EngineStats(config(), enabled=True)
    stats.on_finished(
        e2e=2.0, prompt_tokens=7, generation_tokens=[3, 90], n=2, best_of=4, finish_reasons=["stop", "length"]
    )
    assert value(stats, "vllm:e2e_request_latency_seconds_count") == 1
    assert value(stats, "vllm:request_prompt_tokens_sum") == 7
    assert value(stats, "vllm:request_generation_tokens_count") == 2
    assert value(stats, "vllm:request_generation_tokens_sum") == 93
    assert value(stats, "vllm:request_params_n_sum") == 2
    assert value(stats, "vllm:request_params_best_of_sum") == 4
    assert value(stats, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(stats, "vllm:request_success_total", finished_reason="length") == 1
    assert value(stats, "vllm:request_success_total", finished_reason="abort") == 0


def test_requests_that_did_not_finish_stay_out_of_the_histograms() -> None:
    stats = EngineStats(config(), enabled=True)
    stats.on_aborted("disconnect")
    stats.on_rejected("queue_full")
    stats.on_rejected("queue_full")
    stats.on_failed("nan")
    for name in BUCKETS:
        assert value(stats, name + "_count") == 0
    assert value(stats, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(stats, "aserve:requests_aborted_total", cause="disconnect") == 1
    assert value(stats, "aserve:requests_rejected_total", cause="queue_full") == 2
    assert value(stats, "aserve:requests_failed_total", cause="nan") == 1


def test_engines_do_not_share_or_collide() -> None:
    first = EngineStats(config(), enabled=True)
    first.on_aborted("x")
    second = EngineStats(config(), enabled=True)
    assert value(second, "vllm:request_success_total", finished_reason="abort") == 0


def test_disabled_stats_have_no_series_and_no_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log.logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="aserve")
    stats = EngineStats(config(), enabled=False)
    step(stats, 0.0, running=1)
    step(stats, 100.0, running=1)
    stats.on_aborted("x")
    stats.maybe_log(200.0, force=True)
    assert stats.render() == b""
    assert caplog.records == []


def test_line_of_statistics_at_most_every_five_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log.logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="aserve")
    stats = EngineStats(config(), enabled=True)
    for tenth in range(121):
        step(stats, tenth / 10, running=2, waiting=1, gpu_cache_usage=0.5, generation_tokens=1)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "generation 10.0 tokens/s" in lines[1]
    assert "2 running" in lines[1] and "1 pending" in lines[1] and "GPU 50.0%" in lines[1]
    assert value(stats, "vllm:avg_generation_throughput_toks_per_s") == pytest.approx(10)
    stats.maybe_log(12.5)
    assert len(caplog.records) == 2
    stats.maybe_log(12.5, force=True)
    assert len(caplog.records) == 3


def test_refresh_tells_the_load_of_an_idle_engine() -> None:
    stats = EngineStats(config(), enabled=True)
    step(stats, 0.0, running=5, gpu_cache_usage=0.9)

    def refresh() -> None:
        stats.set_load(running=0, waiting=0, swapped=0, gpu_cache_usage=0.0, cpu_cache_usage=0.0)

    stats.refresh = refresh
    assert value(stats, "vllm:num_requests_running") == 0
    assert value(stats, "vllm:gpu_cache_usage_perc") == 0


async def test_loop_lag_is_observed_at_every_look() -> None:
    stats = EngineStats(config(), enabled=True)
    looks = 0
    async for _ in watch_loop_lag(stats, interval=0.001):
        looks += 1
        if looks == 3:
            break
    assert value(stats, "aserve:event_loop_lag_seconds_count") >= 2


@pytest.mark.parametrize(
    ("limit", "bounds"),
    [(1, [1]), (7, [1, 2, 5]), (10, [1, 2, 5, 10]), (2048, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000])],
)
def test_one_two_five(limit: int, bounds: list[int]) -> None:
    assert one_two_five(limit) == bounds


def test_label_values_are_escaped() -> None:
    metrics = Metrics({"model_name": 'a"b\nc'})
    metrics.gauge("g", "help").set(1)
    assert 'g{model_name="a\\"b\\nc"} 1.0' in metrics.render().decode().splitlines()


def test_the_board_shows_series_that_exist() -> None:
    """examples/grafana.json asks for nothing that is not exposed, and leaves out no histogram or cause."""
    stats = EngineStats(config(), enabled=True)
    text = stats.render().decode()
    exposed = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    exposed |= {f"{name}_bucket" for name in exposed}
    board = json.loads((Path(__file__).parent.parent / "examples" / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    found = {name for expr in asked for name in re.findall(r"\b(?:vllm:|aserve:|process_)\w+", expr)}
    assert found <= exposed, found - exposed
    wanted = {
        "aserve:requests_aborted_total",
        "aserve:event_loop_lag_seconds_bucket",
        "vllm:num_requests_waiting",
    }
    assert wanted <= found
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
