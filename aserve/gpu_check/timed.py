"""The shapes that are timed, and what each is expected to take.

Expected is what the bytes take at 3.0 TB/s or the arithmetic at 798 TFLOP/s, whichever is longer: rates that
good kernels reach on an H100. ``python -m aserve.gpu_check.timed`` writes the table anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from aserve.gpu_check import cases
from aserve.gpu_check.paging import Case
from aserve.gpu_check.problems.base import Check
from aserve.gpu_check.problems.cache import Step
from aserve.gpu_check.problems.draws import Logits
from aserve.gpu_check.problems.moves import Blocks
from aserve.gpu_check.problems.rows import Rows

EXPECTATIONS = Path(__file__).with_name("expectations.json")
BYTES_PER_SECOND = 3.0e12
FLOPS = 798e12

BF16, E4M3 = "bfloat16", "float8_e4m3fn"


def _decode(batch: int, length: int, cached: str = BF16, heads: int = 32, size: int = 128) -> Check:
    return Check("paged_attention", BF16, cached, Case(((1, length),) * batch, heads, 8, size), large=True)


def _prefill(rows: int, count: int, length: int) -> Check:
    return Check("paged_attention", BF16, BF16, Case(((count, length),) * rows, 32, 8, 128), large=True)


TIMED: list[Check] = [
    *(_decode(*each) for each in ((1, 32768), (32, 1024), (256, 1024), (64, 8192))),
    *(_decode(*each, E4M3) for each in ((32, 1024), (256, 1024), (64, 8192))),
    _decode(256, 1024, size=64),
    *(_prefill(*each) for each in ((1, 2048, 2048), (8, 1024, 1024), (1, 2048, 8192))),
    *(
        Check(op, BF16, None, Rows(rows, size), large=True)
        for op, size in (("rms_norm", 4096), ("fused_add_rms_norm", 4096))
        for rows in (256, 8192)
    ),
    *(Check("gated", BF16, None, Rows(rows, 14336, activation="silu"), large=True) for rows in (256, 8192)),
    Check("rotary_embedding", BF16, None, Step(8192, 32, 8, 128, 128), large=True),
    *(
        Check("rope_and_store", BF16, cached, Step(tokens, 32, 8, 128, 128), large=True)
        for tokens, cached in ((256, BF16), (8192, BF16), (8192, E4M3))
    ),
    Check("store_kv", BF16, BF16, Step(8192, 32, 8, 128, 128), large=True),
    *(Check("greedy_logprob", "float32", None, Rows(rows, 128256), large=True) for rows in (1, 32, 256)),
    *(Check("sample", "float32", None, Logits(rows, 128256), large=True) for rows in (1, 32, 256)),
    Check("penalties", "float32", None, Logits(256, 128256, 4000), large=True),
    Check("copy_blocks", BF16, BF16, Blocks(64, 32, 300, 8, 16, 128), large=True),
]


def predicted(check: Check) -> float:
    """Microseconds."""
    cost = cases.OPERATIONS[check.op].cost(check)
    return max(cost.bytes / BYTES_PER_SECOND, cost.flops / FLOPS) * 1e6


def name_of(check: Check) -> str:
    """Short: equal rows are counted."""
    shape = check.shape
    if isinstance(shape, Case):
        count, length = shape.rows[0]
        many = f"{len(shape.rows)}x{count}/{length} h{shape.heads}/{shape.kv_heads}x{shape.head_size}"
        return f"{check.op} {check.dtype}/{check.cache_dtype} {many} b{shape.block_size}"
    return str(check)


def expectations() -> dict[str, float]:
    """The committed table: microseconds by name."""
    return {str(name): float(value) for name, value in json.loads(EXPECTATIONS.read_text()).items()}


def render() -> str:
    return json.dumps({name_of(check): round(predicted(check), 2) for check in TIMED}, indent=2) + "\n"


if __name__ == "__main__":
    EXPECTATIONS.write_text(render())
    print(f"wrote {EXPECTATIONS}", file=sys.stderr)
