"""What the CUDA kernels have been proved to do on a GPU, and the rule that follows from it.

A kernel's emulated tests say that its logic is right; only a run on the hardware says that it is right there.
Such a run leaves one line of JSON a case in ``gpu_results.jsonl`` beside this file:

``kind``  "correctness"; lines of other kinds are not read here
``op``, ``dtype``, ``cache_dtype``  the case; the last is null for operations without a cache
``passed``  whether the results were within the rounding of their type
``device``, ``capability``, ``date``  where and when: a name, [major, minor], YYYY-MM-DD
``sources``  the digest of the kernels that ran, ``sources_digest`` of cuda_ext/cuda/build.py

A combination is verified on an architecture where some case of it passed there with the very kernels in use,
and none failed. On CUDA an operation that is not verified runs in torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from aserve.errors import ConfigError

RESULTS = Path(__file__).with_name("gpu_results.jsonl")

FLOATS = ("float32", "bfloat16", "float16")
NARROW = ("float8_e4m3fn", "float8_e5m2")
WITH_CACHE = ("paged_attention", "rope_and_store", "store_kv")
# Operations that the CUDA library registers.
BOUND = (
    "rms_norm",
    "fused_add_rms_norm",
    "gated",
    "rotary_embedding",
    "rope_and_store",
    "store_kv",
    "paged_attention",
    "greedy_logprob",
    "copy_blocks",
    "swap_blocks",
    "penalties",
    "sample",
)
# They move the cache's blocks, and have no dtype but its.
MOVES = ("copy_blocks", "swap_blocks")


@dataclass(frozen=True)
class Combination:
    op: str
    dtype: str
    cache_dtype: str | None = None


@dataclass(frozen=True)
class Result:
    """What one run found for one combination."""

    what: Combination
    passed: bool
    device: str
    major: int
    date: str
    sources: str


def combinations() -> Iterator[Combination]:
    """Everything the CUDA library serves, in the order of the table."""
    for op in BOUND:
        if op in MOVES:
            yield from (Combination(op, dtype, dtype) for dtype in (*FLOATS, *NARROW))
            continue
        for dtype in FLOATS:
            if op not in WITH_CACHE:
                yield Combination(op, dtype)
                continue
            # Attention multiplies 8-bit keys with 16-bit queries only.
            narrow = () if op == "paged_attention" and dtype == "float32" else NARROW
            for cached in (dtype, *narrow):
                yield Combination(op, dtype, cached)


def read(lines: Iterable[str], name: str = RESULTS.name) -> list[Result]:
    """The lines of a results file. ConfigError: one that is not as described above."""
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if row["kind"] == "correctness":
                found.append(_result(row))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"{name}, line {number}, is no result of a GPU run: {error!r}") from None
    return found


def _result(row: Mapping[str, Any]) -> Result:
    what = Combination(row["op"], row["dtype"], row["cache_dtype"])
    if what not in set(combinations()):
        raise ValueError(f"there is no {what}")
    if not isinstance(row["passed"], bool):
        raise ValueError("passed must be true or false")
    texts = [row[key] for key in ("device", "date", "sources")]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("device, date and sources must be texts")
    return Result(what, row["passed"], texts[0], int(row["capability"][0]), texts[1], texts[2])


@cache
def committed() -> tuple[Result, ...]:
    """The results that came with aserve; none where no GPU run has been committed."""
    return tuple(read(RESULTS.read_text().splitlines())) if RESULTS.exists() else ()


def verified(what: Combination, major: int, sources: str, results: Iterable[Result]) -> bool:
    """Whether `what` is verified for kernels of that digest on devices of capability major.x."""
    mine = [r.passed for r in results if (r.what, r.major, r.sources) == (what, major, sources)]
    return bool(mine) and all(mine)


def render(sources: str, results: Iterable[Result]) -> str:
    """The table of the README, in Markdown."""
    results = list(results)
    lines = ["| Operation | dtype | KV cache | On hardware |", "| --- | --- | --- | --- |"]
    for what in combinations():
        runs = [r for r in results if r.what == what and r.sources == sources]
        on = [
            f"verified, {last.device}, {last.date}"
            for major in sorted({r.major for r in runs})
            if verified(what, major, sources, runs)
            for last in [max((r for r in runs if r.major == major), key=lambda r: r.date)]
        ]
        failed = sorted({f"failed, {r.device}, {r.date}" for r in runs if not r.passed})
        state = "; ".join(on + failed) or "unverified"
        lines.append(f"| `{what.op}` | {what.dtype} | {what.cache_dtype or ''} | {state} |")
    return "\n".join(lines) + "\n"
