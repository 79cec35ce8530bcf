from __future__ import annotations

import pytest

from aserve.bench import metrics
from aserve.bench.client import Answer
from aserve.errors import ConfigError


def answer(ttft: float, gaps: list[float], prompt: int = 10) -> Answer:
    return Answer(
        ttft=ttft,
        latency=ttft + sum(gaps),
        itl=gaps,
        prompt_tokens=prompt,
        output_tokens=len(gaps) + 1,
    )


ANSWERS = [
    answer(0.1, [0.01, 0.03]),
    answer(0.3, [0.02, 0.02]),
    Answer(error="status 500", prompt_tokens=10),
    answer(0.2, [0.05, 0.05], prompt=20),
]


def test_a_summary_counts_what_succeeded() -> None:
    found = metrics.summary(
        ANSWERS, 2.0, metrics=["ttft", "tpot", "itl", "e2el"], percentiles=[50, 99.9], goodput={}
    )
    assert (found["completed"], found["failed"]) == (3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (40, 9)
    assert found["request_throughput"] == 1.5
    assert found["output_throughput"] == 4.5
    assert found["total_token_throughput"] == 24.5
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["median_ttft_ms"] == found["p50_ttft_ms"] == pytest.approx(200)
    assert found["p99.9_ttft_ms"] == pytest.approx(299.8)
    assert found["mean_tpot_ms"] == pytest.approx((20 + 20 + 50) / 3)
    assert found["mean_itl_ms"] == pytest.approx(180 / 6)
    assert found["mean_e2el_ms"] == pytest.approx((140 + 340 + 300) / 3)
    assert found["std_ttft_ms"] == pytest.approx(81.65, abs=0.01)


def test_a_single_token_has_no_time_per_token() -> None:
    found = metrics.summary(
        [answer(0.1, []), answer(0.1, [0.5])], 1, metrics=["tpot"], percentiles=[], goodput={}
    )
    assert found["mean_tpot_ms"] == pytest.approx(500)


def test_goodput_needs_every_limit_to_be_met() -> None:
    limits = metrics.parse_goodput(["ttft:250", "tpot:40"])
    found = metrics.summary(ANSWERS, 2.0, metrics=[], percentiles=[], goodput=limits)
    assert found["request_goodput"] == 0.5


def test_the_block() -> None:
    chosen = ["ttft", "itl"]
    found = metrics.summary(ANSWERS, 2.0, metrics=chosen, percentiles=[99], goodput={"ttft": 250.0})
    text = metrics.block(found, chosen, [99], max_concurrency=4, request_rate=3.0)
    lines = text.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[-1] == "=" * 50
    rows = dict(line.rsplit(maxsplit=1) for line in lines if ":" in line)
    assert rows["Successful requests:"] == "3"
    assert rows["Failed requests:"] == "1"
    assert rows["Maximum request concurrency:"] == "4"
    assert rows["Request rate configured (RPS):"] == "3.00"
    assert rows["Benchmark duration (s):"] == "2.00"
    assert rows["Total input tokens:"] == "40"
    assert rows["Total generated tokens:"] == "9"
    assert rows["Request throughput (req/s):"] == "1.50"
    assert rows["Request goodput (req/s):"] == "1.00"
    assert rows["Output token throughput (tok/s):"] == "4.50"
    assert rows["Total Token throughput (tok/s):"] == "24.50"
    assert rows["Mean TTFT (ms):"] == "200.00"
    assert rows["Median ITL (ms):"] == "25.00"
    assert "P99 ITL (ms):" in rows and "P99 TPOT (ms):" not in rows
    assert "---------------Time to First Token----------------" in lines


@pytest.mark.parametrize(
    ("parse", "bad"),
    [
        (metrics.parse_metrics, "ttft,speed"),
        (metrics.parse_percentiles, "50,101"),
        (metrics.parse_percentiles, "many"),
        (metrics.parse_goodput, ["ttft"]),
        (metrics.parse_goodput, ["itl:5"]),
        (metrics.parse_goodput, ["ttft:-1"]),
        (metrics.parse_goodput, ["ttft:nan"]),
    ],
)
def test_unusable_values_are_refused(parse, bad) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError):
        parse(bad)
