"""``aserve bench limits``: what this machine can read and compute at best, measured by the extension.

The same functions measure how fast given buffers can be read *in this process*, which is the bound of a
decode step that reads all its weights once.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from aserve.errors import ConfigError
from aserve.ops import native

PEAKS = {"fp32 FMA": 0, "bf16 dot": 1, "int8 dot": 2}

_MIB = 1 << 20
_SWEEP_LEAST = 256 * _MIB


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="aserve bench limits", description=__doc__, allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=default_threads(), help="(default: one a core)")
    parser.add_argument("--output-json", metavar="FILE", help="Write the result here too.")
    options = parser.parse_args(argv)
    if options.threads < 1:
        raise ConfigError(f"threads must be at least 1, got {options.threads}", param="threads")
    found = machine(options.threads)
    for name, rate in found["read_gb_per_s"].items():
        print(f"{'read ' + name + ' (GB/s):':<40} {rate:.1f}")
    for name, rate in found["peak_gop_per_s"].items():
        print(f"{name + ' (GOP/s):':<40} {rate:.0f}")
    if options.output_json:
        Path(options.output_json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def default_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(threads: int) -> dict[str, Any]:
    """Reads of several sizes (GB/s) and the peak of each kind of product (10^9 operations/s)."""
    reads = {}
    for size in (16, 64, 96, 256, 1024):
        reads[f"{size} MiB"] = read_rate([torch.ones(size * _MIB, dtype=torch.uint8)], threads) / 1e9
    return {"threads": threads, "read_gb_per_s": reads, "peak_gop_per_s": peaks(threads)}


def peaks(threads: int) -> dict[str, float]:
    """10^9 operations per second of each kind of product; 0 for a kind this CPU has no instruction for."""
    return {name: _library().aserve_limits_peak(kind, threads) / 1e9 for name, kind in PEAKS.items()}


def read_rate(
    tensors: Iterable[torch.Tensor], threads: int, *, cold: bool = False, repeats: int | None = None
) -> float:
    """Bytes per second of a plain read of the tensors' memory by ``threads`` threads.

    Warm: the best of many rounds, one right after the other. cold: the median of rounds before each of
    which a buffer larger than any cache has been walked. Memory that several tensors share counts once.
    """
    spans = memory_of(tensors)
    total = sum(size for _, size in spans)
    if not spans or total < 4096:
        raise ConfigError("there is nothing to read")
    rounds = repeats or (7 if cold else max(5, min(200, (2 << 30) // total)))
    sweep = torch.ones(max(_SWEEP_LEAST, 8 * _last_level_cache()), dtype=torch.uint8) if cold else None
    seconds = (ctypes.c_double * rounds)()
    status = _library().aserve_limits_read(
        (ctypes.c_void_p * len(spans))(*(start for start, _ in spans)),
        (ctypes.c_size_t * len(spans))(*(size for _, size in spans)),
        len(spans),
        threads,
        rounds,
        sweep.data_ptr() if sweep is not None else None,
        sweep.numel() if sweep is not None else 0,
        seconds,
    )
    if status != 0:
        raise ConfigError("this machine's memory cannot be measured: it has no AVX2")
    took = statistics.median(seconds) if cold else min(seconds)
    return float(total / took)


def memory_of(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Address and size of each stretch of memory, overlapping ones joined, in order of address."""
    spans: list[tuple[int, int]] = []
    for start, size in sorted((t.data_ptr(), t.numel() * t.element_size()) for t in tensors):
        end = start + size
        if spans and start <= spans[-1][0] + spans[-1][1]:
            first, length = spans.pop()
            spans.append((first, max(first + length, end) - first))
        elif size:
            spans.append((start, size))
    return spans


def _last_level_cache() -> int:
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes)


def _library() -> Any:
    reason = native.why_missing()
    if reason is not None:
        raise ConfigError(f"the limits are measured by the native extension, and {reason}")
    library = ctypes.CDLL(str(native.LIBRARY))
    library.aserve_limits_peak.restype = ctypes.c_double
    library.aserve_limits_peak.argtypes = [ctypes.c_int, ctypes.c_int]
    library.aserve_limits_read.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
    ]
    return library
