"""Figures over the answers of a run, and the block that shows them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from aserve.bench.client import Answer
from aserve.errors import ConfigError

TITLES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}

_WIDTH = 50


def parse_metrics(text: str) -> list[str]:
    """``ttft,tpot`` as a list. ConfigError: a name that is none of ttft, tpot, itl, e2el."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TITLES:
            raise ConfigError(f"{name!r} is not one of {', '.join(TITLES)}", param="percentile_metrics")
    return names


def parse_percentiles(text: str) -> list[float]:
    """``50,99.9`` as numbers. ConfigError: not numbers from 0 to 100."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 100 for value in values):
        raise ConfigError(f"expected percentiles from 0 to 100, got {text!r}", param="metric_percentiles")
    return values


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """``ttft:200`` entries (milliseconds) by name. ConfigError: another metric, or no positive number."""
    limits = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if name not in ("ttft", "tpot", "e2el") or not value > 0:
            raise ConfigError(
                f"expected ttft:MS, tpot:MS or e2el:MS with MS above 0, got {pair!r}", param="goodput"
            )
        limits[name] = value
    return limits


def samples(answers: Sequence[Answer], name: str) -> list[float]:
    """Milliseconds of the metric ``name``, over the successful answers."""
    good = [answer for answer in answers if answer.error is None]
    if name == "ttft":
        values = [answer.ttft for answer in good]
    elif name == "tpot":
        values = [answer.tpot for answer in good if answer.output_tokens > 1]
    elif name == "itl":
        values = [gap for answer in good for gap in answer.itl]
    else:
        values = [answer.latency for answer in good]
    return [value * 1000 for value in values]


def summary(
    answers: Sequence[Answer],
    seconds: float,
    *,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    goodput: dict[str, float],
) -> dict[str, Any]:
    """The result of a run under the names the reference benchmark saves."""
    good = [answer for answer in answers if answer.error is None]
    inputs = sum(answer.prompt_tokens for answer in good)
    outputs = sum(answer.output_tokens for answer in good)
    result: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
    }
    if goodput:
        met = sum(all(_metric(answer, name) <= limit for name, limit in goodput.items()) for answer in good)
        result["request_goodput"] = met / seconds
    for name in metrics:
        values = samples(good, name)
        result[f"mean_{name}_ms"] = statistics.fmean(values) if values else 0.0
        result[f"median_{name}_ms"] = statistics.median(values) if values else 0.0
        result[f"std_{name}_ms"] = statistics.pstdev(values) if values else 0.0
        for percentile in percentiles:
            value = float(np.percentile(values, percentile)) if values else 0.0
            result[f"p{percentile:g}_{name}_ms"] = value
    return result


def _metric(answer: Answer, name: str) -> float:
    return {"ttft": answer.ttft, "tpot": answer.tpot, "e2el": answer.latency}[name] * 1000


def block(
    result: dict[str, Any],
    metrics: Sequence[str],
    percentiles: Sequence[float],
    *,
    max_concurrency: int | None = None,
    request_rate: float = float("inf"),
) -> str:
    """The result as the familiar block of text."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]

    def row(label: str, value: float | int) -> None:
        shown = f"{value:<10}" if isinstance(value, int) else f"{value:<10.2f}"
        lines.append(f"{label:<40} {shown}".rstrip())

    row("Successful requests:", result["completed"])
    row("Failed requests:", result["failed"])
    if max_concurrency is not None:
        row("Maximum request concurrency:", max_concurrency)
    if request_rate != float("inf"):
        row("Request rate configured (RPS):", request_rate)
    row("Benchmark duration (s):", result["duration"])
    row("Total input tokens:", result["total_input_tokens"])
    row("Total generated tokens:", result["total_output_tokens"])
    row("Request throughput (req/s):", result["request_throughput"])
    if "request_goodput" in result:
        row("Request goodput (req/s):", result["request_goodput"])
    row("Output token throughput (tok/s):", result["output_throughput"])
    row("Total Token throughput (tok/s):", result["total_token_throughput"])
    for name in metrics:
        title, short = TITLES[name]
        lines.append(f"{title:-^{_WIDTH}}")
        row(f"Mean {short} (ms):", result[f"mean_{name}_ms"])
        row(f"Median {short} (ms):", result[f"median_{name}_ms"])
        for percentile in percentiles:
            row(f"P{percentile:g} {short} (ms):", result[f"p{percentile:g}_{name}_ms"])
    lines.append("=" * _WIDTH)
    return "\n".join(lines)
