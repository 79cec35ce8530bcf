"""Draws the charts of this folder's README anew: ``python -m aserve.simulate.plots``."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from aserve.simulate import compare
from aserve.simulate.compare import Scenario
from aserve.simulate.device import PRESETS
from aserve.simulate.svg import Points, line_chart
from aserve.simulate.trace import Lengths, TraceSpec

FOLDER = Path(__file__).parent
CHAT = TraceSpec(
    Lengths.parse("lognormal:600:0.9:6000", "input_len"),
    Lengths.parse("lognormal:200:0.7:1500", "output_len"),
    count=1000,
)
RATES = (4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 28.0, 32.0)
PROMPT_POLICIES: dict[str, dict[str, Any]] = {
    "whole prompts first": {"chunked_prefill": False},
    "chunks, 512 tokens a step": {"chunked_prefill": True, "max_num_batched_tokens": 512},
    "chunks, 2048 tokens a step": {"chunked_prefill": True, "max_num_batched_tokens": 2048},
}
SEQUENCES = (16, 24, 32, 40, 48, 56, 64, 80, 96)
PREFIXES = (0, 250, 500, 1000, 2000, 3000)


def main() -> None:
    jobs = os.cpu_count() or 1
    for name, text in (prompts(jobs) | sequences(jobs) | memory() | prefixes(jobs)).items():
        (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")


def prompts(jobs: int) -> dict[str, str]:
    """How prompts are mixed with decodes, under rising load."""
    base = Scenario(PRESETS["h100-8b"], CHAT)
    scenarios = [
        base.with_choices(chosen).at_rate(rate) for chosen in PROMPT_POLICIES.values() for rate in RATES
    ]
    results = iter(compare.summarise_all(scenarios, jobs))
    found = {name: [next(results) for _ in RATES] for name in PROMPT_POLICIES}

    def lines(figure: str) -> dict[str, Points]:
        return {
            name: [(rate, each[figure]) for rate, each in zip(RATES, results, strict=True)]
            for name, results in found.items()
        }

    rates = "requests per second"
    return {
        "itl-by-rate": line_chart(
            "Longest waits between tokens, h100-8b", rates, "p99 ITL, ms", lines("p99_itl_ms"), log_y=True
        ),
        "ttft-by-rate": line_chart(
            "Longest waits for the first token, h100-8b",
            rates,
            "p99 TTFT, ms",
            lines("p99_ttft_ms"),
            log_y=True,
        ),
    }


def sequences(jobs: int) -> dict[str, str]:
    """How many sequences run at once, at one load."""
    base = Scenario(PRESETS["h100-8b"], CHAT).at_rate(16.0)
    results = compare.summarise_all([base.with_choices({"max_num_seqs": count}) for count in SEQUENCES], jobs)
    names = {"p99 TTFT": "p99_ttft_ms", "p99 queue time": "p99_queue_ms", "p50 ITL": "p50_itl_ms"}
    lines = {
        name: [
            (float(count), max(each[figure], 1e-2)) for count, each in zip(SEQUENCES, results, strict=True)
        ]
        for name, figure in names.items()
    }
    title = "Sequences at a time, h100-8b, 16 requests per second"
    return {"sequences": line_chart(title, "max_num_seqs", "ms", lines, log_y=True)}


def memory() -> dict[str, str]:
    """Use of the KV cache over time as arrivals come in bursts."""
    lines: dict[str, Points] = {}
    base = Scenario(PRESETS["h100x4-70b"], dataclasses.replace(CHAT, count=1500, rate=7.0))
    for name, burstiness in (
        ("even (gamma 4)", 4.0),
        ("Poisson", 1.0),
        ("bursts (gamma 0.1)", 0.1),
    ):
        run = compare.simulate(
            dataclasses.replace(
                base,
                spec=dataclasses.replace(CHAT, count=1500, rate=7.0, burstiness=burstiness),
                chosen={"num_blocks": 5000},
            )
        )
        buckets = run.timeline.buckets
        group = max(1, len(buckets) // 120)
        lines[f"{name}: {run.preemptions} preempted"] = [
            (buckets[at].start, 100 * max(bucket.kv_usage for bucket in buckets[at : at + group]))
            for at in range(0, len(buckets), group)
        ]
    title = "KV cache over time, h100x4-70b, 5000 blocks, 7 requests per second"
    return {"kv-over-time": line_chart(title, "seconds", "KV blocks in use, %", lines)}


def prefixes(jobs: int) -> dict[str, str]:
    """What a shared system prompt costs with and without prefix caching."""
    base = Scenario(PRESETS["h100-8b"], dataclasses.replace(CHAT, count=500, rate=8.0))
    lines: dict[str, Points] = {}
    for name, caching in (("off", False), ("on", True)):
        scenarios = [
            dataclasses.replace(
                base,
                spec=dataclasses.replace(CHAT, count=500, rate=8.0, prefix_tokens=length),
                chosen={"prefix_caching": caching},
            )
            for length in PREFIXES
        ]
        results = compare.summarise_all(scenarios, jobs)
        lines[f"prefix caching {name}"] = [
            (float(length), each["p50_ttft_ms"]) for length, each in zip(PREFIXES, results, strict=True)
        ]
    title = "A shared system prompt, h100-8b, 8 requests per second"
    return {"prefix": line_chart(title, "shared tokens", "p50 TTFT, ms", lines, log_y=True)}


if __name__ == "__main__":
    main()
