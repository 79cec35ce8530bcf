"""Figures of a simulation, and the block that shows them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from aserve.simulate.device import as_json
from aserve.simulate.virtual import CAPPED, FINISHED, REJECTED, TIMED_OUT, TOO_LONG, Outcome, Run

METRICS = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
    "queue": ("Queue Time", "Queue"),
}
PERCENTILES = (50.0, 90.0, 99.0)

_WIDTH = 50


def summary(
    run: Run, goodput: dict[str, float], percentiles: Sequence[float] = PERCENTILES
) -> dict[str, Any]:
    """The result under the names that ``aserve bench serve`` saves, and what only a simulator knows.

    goodput: milliseconds not to be exceeded by ``ttft``, ``tpot`` and ``e2el``; ``attainment`` is the share
    of all requests sent that ended within them, one that was rejected or timed out being no success.
    Latencies are over requests that finished; gaps between tokens over all.
    """
    good = [outcome for outcome in run.outcomes if outcome.cause == FINISHED]
    causes = Counter(outcome.cause for outcome in run.outcomes)
    seconds = max(run.seconds, 1e-9)
    device = run.profile.device
    inputs = sum(outcome.request.input_tokens for outcome in good)
    outputs = sum(outcome.tokens for outcome in good)
    sent = len(run.outcomes)
    met = sum(_meets(outcome, goodput) for outcome in good)
    needed = sum(outcome.request.input_tokens + max(0, outcome.tokens - 1) for outcome in good)
    result: dict[str, Any] = {
        "simulated": True,
        "device": run.profile.name,
        "sent": sent,
        "completed": causes[FINISHED],
        "failed": sent - causes[FINISHED],
        "too_long": causes[TOO_LONG],
        "rejected": causes[REJECTED],
        "timed_out": causes[TIMED_OUT],
        "capped": causes[CAPPED],
        "duration": run.seconds,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "request_goodput": met / seconds,
        "attainment": met / sent if sent else 0.0,
        "steps": run.steps,
        "mean_step_ms": 1000 * run.busy / run.steps if run.steps else 0.0,
        "mean_step_tokens": run.computed / run.steps if run.steps else 0.0,
        "device_utilisation": run.busy / seconds,
        "flops_utilisation": run.operations / (seconds * device.flops * device.count),
        "bandwidth_utilisation": run.bytes / (seconds * device.bandwidth * device.count),
        "preemptions": run.preemptions,
        "computed_tokens": run.computed,
        "cached_tokens": run.cached,
        "recomputed_tokens": max(0, run.computed + run.cached - needed) if causes[FINISHED] == sent else None,
        "peak_kv_usage": max((bucket.kv_usage for bucket in run.timeline.buckets), default=0.0),
        "num_blocks": run.limits.num_blocks,
    }
    samples = {
        "ttft": [outcome.ttft for outcome in good],
        "tpot": [outcome.tpot for outcome in good if outcome.tokens > 1],
        "itl": run.gaps,
        "e2el": [outcome.latency for outcome in good],
        "queue": [
            outcome.scheduled - outcome.sent for outcome in run.outcomes if outcome.scheduled is not None
        ],
    }
    for name, values in samples.items():
        result |= _figures(name, np.asarray(values, dtype=np.float64) * 1000, percentiles)
    return result


def details(run: Run) -> dict[str, Any]:
    """What a result can be taken apart by: settings, use over time, and every request's own times."""
    return {
        "profile": as_json(run.profile),
        "limits": dataclasses.asdict(run.limits) | dataclasses.asdict(run.serving),
        "timeline": {
            "width": run.timeline.width,
            **{
                field.name: [getattr(bucket, field.name) for bucket in run.timeline.buckets]
                for field in dataclasses.fields(run.timeline.buckets[0])
            },
        }
        if run.timeline.buckets
        else {},
        "requests": [
            {
                "sent": outcome.sent,
                "input_tokens": outcome.request.input_tokens,
                "output_tokens": outcome.tokens,
                "scheduled": outcome.scheduled,
                "first_token": outcome.first,
                "last_token": outcome.last,
                "preemptions": outcome.preemptions,
                "cause": outcome.cause,
            }
            for outcome in run.outcomes
        ],
    }


def block(result: dict[str, Any], goodput: dict[str, float], *, rate: float = math.inf) -> str:
    """The result as the block of text that serving benchmarks print."""
    lines = [f"{' Simulated Serving Result ':=^{_WIDTH}}"]

    def row(label: str, value: float | int | str) -> None:
        shown = f"{value:.2f}" if isinstance(value, float) else str(value)
        lines.append(f"{label:<40} {shown}")

    row("Device:", result["device"])
    row("Successful requests:", result["completed"])
    for name in ("too_long", "rejected", "timed_out", "capped"):
        if result[name]:
            row(f"{name.replace('_', ' ').capitalize()} requests:", result[name])
    if rate != math.inf:
        row("Request rate configured (RPS):", rate)
    row("Simulated duration (s):", result["duration"])
    row("Total input tokens:", result["total_input_tokens"])
    row("Total generated tokens:", result["total_output_tokens"])
    row("Request throughput (req/s):", result["request_throughput"])
    if goodput:
        row("Request goodput (req/s):", result["request_goodput"])
        row("Requests within the limits (%):", 100 * result["attainment"])
    row("Output token throughput (tok/s):", result["output_throughput"])
    row("Total Token throughput (tok/s):", result["total_token_throughput"])
    percentiles = [name[1:-8] for name in result if name.startswith("p") and name.endswith("_ttft_ms")]
    for name, (title, short) in METRICS.items():
        lines.append(f"{title:-^{_WIDTH}}")
        row(f"Mean {short} (ms):", result[f"mean_{name}_ms"])
        for percentile in percentiles:
            row(f"P{percentile} {short} (ms):", result[f"p{percentile}_{name}_ms"])
    lines.append(f"{'Device':-^{_WIDTH}}")
    row("Busy (%):", 100 * result["device_utilisation"])
    row("Share of peak operations (%):", 100 * result["flops_utilisation"])
    row("Share of peak bandwidth (%):", 100 * result["bandwidth_utilisation"])
    row("Steps:", result["steps"])
    row("Mean step (ms):", result["mean_step_ms"])
    row("Mean tokens per step:", result["mean_step_tokens"])
    row("KV blocks:", result["num_blocks"])
    row("Peak KV usage (%):", 100 * result["peak_kv_usage"])
    row("Preemptions:", result["preemptions"])
    if result["cached_tokens"]:
        row("Prompt tokens from the cache:", result["cached_tokens"])
    if result["recomputed_tokens"]:
        row("Tokens computed again:", result["recomputed_tokens"])
    lines.append("=" * _WIDTH)
    return "\n".join(lines)


COLUMNS = {
    "goodput": ("attainment", "{:.1%}"),
    "failed": ("failed", "{}"),
    "req/s": ("request_throughput", "{:.2f}"),
    "tok/s": ("output_throughput", "{:.0f}"),
    "TTFT p50": ("p50_ttft_ms", "{:.0f}"),
    "TTFT p99": ("p99_ttft_ms", "{:.0f}"),
    "ITL p50": ("p50_itl_ms", "{:.1f}"),
    "ITL p99": ("p99_itl_ms", "{:.1f}"),
    "E2EL p99": ("p99_e2el_ms", "{:.0f}"),
    "queue p99": ("p99_queue_ms", "{:.0f}"),
    "busy": ("device_utilisation", "{:.0%}"),
    "KV peak": ("peak_kv_usage", "{:.0%}"),
    "preempted": ("preemptions", "{}"),
}


def table(labels: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], goodput: bool) -> str:
    """One line per result under the names of what differs and of the main figures (times in ms)."""
    columns = {title: each for title, each in COLUMNS.items() if goodput or title != "goodput"}
    rows = [[*labels[0], *columns]]
    for label, result in zip(labels, results, strict=True):
        shown = [form.format(result[name]) for name, form in columns.values()]
        rows.append([_spelled(value) for value in label.values()] + shown)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _meets(outcome: Outcome, goodput: dict[str, float]) -> bool:
    times = {"ttft": outcome.ttft, "tpot": outcome.tpot, "e2el": outcome.latency}
    return all(times[name] * 1000 <= limit for name, limit in goodput.items())


def _figures(name: str, values: Any, percentiles: Sequence[float]) -> dict[str, float]:
    empty = not len(values)
    found = {
        f"mean_{name}_ms": 0.0 if empty else float(values.mean()),
        f"median_{name}_ms": 0.0 if empty else float(np.median(values)),
        f"std_{name}_ms": 0.0 if empty else float(values.std()),
    }
    marks = [0.0] * len(percentiles) if empty else np.percentile(values, percentiles).tolist()
    return found | {f"p{mark:g}_{name}_ms": value for mark, value in zip(percentiles, marks, strict=True)}
