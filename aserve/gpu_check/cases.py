"""Every shape the kernels are checked with, on the CPU by the tests and on a GPU by ``aserve gpu-check``.

A new operation is an entry of ``OPERATIONS`` and a function here that yields its shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from aserve.gpu_check.paging import Case
from aserve.gpu_check.problems import attention, cache, draws, moves, rows
from aserve.gpu_check.problems.base import Check, Operation
from aserve.gpu_check.problems.cache import Step
from aserve.gpu_check.problems.draws import Logits
from aserve.gpu_check.problems.moves import Blocks
from aserve.gpu_check.problems.rows import ACTIVATIONS, Rows
from aserve.ops.hardware import FLOATS, MOVES, NARROW, Combination, combinations

OPERATIONS: dict[str, Operation] = {
    "rms_norm": rows.RMS_NORM,
    "fused_add_rms_norm": rows.FUSED_ADD_RMS_NORM,
    "gated": rows.GATED,
    "rotary_embedding": cache.ROTARY_EMBEDDING,
    "rope_and_store": cache.ROPE_AND_STORE,
    "store_kv": cache.STORE_KV,
    "paged_attention": attention.PAGED_ATTENTION,
    "greedy_logprob": rows.GREEDY_LOGPROB,
    "copy_blocks": moves.COPY_BLOCKS,
    "swap_blocks": moves.SWAP_BLOCKS,
    "penalties": draws.PENALTIES,
    "sample": draws.SAMPLE,
}

BF16 = "bfloat16"
HALVES = ("bfloat16", "float16")
BLOCKS = (8, 16, 32)
CACHED = [(dtype, cached) for dtype in FLOATS for cached in (dtype, *NARROW)]
ATTENDED = [(c.dtype, str(c.cache_dtype)) for c in combinations() if c.op == "paged_attention"]

ONE = ((1, 1), (1, 17), (1, 70))
MIXED = ((5, 5), (33, 140), (1, 1), (70, 70), (1, 100))


def edges(block_size: int) -> tuple[tuple[int, int], ...]:
    """Decodes of length 1 and around whole blocks."""
    lengths = {1, *(k * block_size + off for k in (1, 2, 4) for off in (-1, 0, 1))}
    return tuple((1, length) for length in sorted(lengths))


def norms() -> Iterator[Check]:
    for dtype in FLOATS:
        for size in (576, 1, 7, 8, 2050, 4096):
            yield Check("rms_norm", dtype, None, Rows(3, size))
            yield Check("fused_add_rms_norm", dtype, None, Rows(3, size, apart=size == 576))
        yield Check("rms_norm", dtype, None, Rows(5, 64, heads=3, apart=True))
        yield Check("rms_norm", dtype, None, Rows(2, 40, heads=5))
        yield Check("rms_norm", dtype, None, Rows(256, 4096), large=True)
        yield Check("fused_add_rms_norm", dtype, None, Rows(2050, 5120), large=True)
    for dtype in HALVES:
        yield Check("rms_norm", dtype, None, Rows(4, 640, wide=True))


def activations() -> Iterator[Check]:
    for dtype in FLOATS:
        for activation in ACTIVATIONS:
            for size in (1, 8, 1543):
                yield Check("gated", dtype, None, Rows(3, size, activation=activation))
            yield Check("gated", dtype, None, Rows(257, 14336, activation=activation), large=True)
        yield Check("gated", dtype, None, Rows(2, 48, heads=3, apart=True, activation="silu"))


def rotations() -> Iterator[Check]:
    shapes = ((64, 64), (64, 32), (80, 80), (128, 128), (96, 24), (20, 20), (16, 2), (256, 256))
    for at, (head_size, rotary) in enumerate(shapes):
        for interleaved in (False, True):
            shape = Step(5, head_size=head_size, rotary=rotary, interleaved=interleaved)
            for dtype in FLOATS if at < 2 else (FLOATS[(at + interleaved) % 3],):
                yield Check("rotary_embedding", dtype, None, shape)
    for dtype in FLOATS:
        yield Check("rotary_embedding", dtype, None, Step(1025, 32, 8, 128, 128), large=True)


def stores() -> Iterator[Check]:
    sizes = ((64, 64), (128, 128), (96, 64))
    for at, (dtype, cached) in enumerate(CACHED):
        for turn, block_size in enumerate(BLOCKS):
            head_size, rotary = sizes[(at + turn) % 3]
            shape = Step(19, 4, 2, head_size, rotary, bool((at + turn) % 2), block_size)
            yield Check("rope_and_store", dtype, cached, shape)
            yield Check("store_kv", dtype, cached, shape)
        for op in ("rope_and_store", "store_kv"):
            yield Check(op, dtype, cached, Step(8, 8, 1, 64, 64, padding=3), padded=True)
            yield Check(op, dtype, cached, Step(2049, 32, 8, 128, 128), large=True)


def decodes() -> Iterator[Check]:
    for at, (dtype, cached) in enumerate(ATTENDED):
        for block_size in BLOCKS:
            heads = ((4, 4), (4, 1), (8, 1))[(at + block_size // 8) % 3]
            yield Check("paged_attention", dtype, cached, Case(edges(block_size), *heads, 64, block_size))
        # One, three, four and eight query heads a KV head.
        for turn, heads in enumerate(((2, 2), (6, 2), (8, 2), (8, 1))):
            size = (64, 80, 96, 112, 128, 192, 256)[(at * 4 + turn) % 7]
            yield Check("paged_attention", dtype, cached, Case(ONE, *heads, size))
        yield Check("paged_attention", dtype, cached, Case(((1, 300), (3, 40), (2, 900)), 8, 2))
        padded = Case((*ONE, (1, 0), (1, 0)), 8, 2)
        yield Check("paged_attention", dtype, cached, padded, padded=True)
        # A captured step's table has room for the longest sequence, so most parts of the keys are empty.
        yield Check("paged_attention", dtype, cached, Case(((1, 700), (1, 1)), 8, 2, spare=468))
        many = tuple((1, 1 + 37 * row % 515) for row in range(256))
        yield Check("paged_attention", dtype, cached, Case(many, 32, 8, 128), large=True)
        few = tuple((1, 60 * row + 1) for row in range(33))
        yield Check("paged_attention", dtype, cached, Case(few, 24, 8, 128, 32), large=True)
        yield Check("paged_attention", dtype, cached, Case(((1, 32768),), 32, 8, 128), large=True)
    for size in (64, 80, 96, 112, 128, 192, 256):
        yield Check("paged_attention", BF16, BF16, Case(ONE, 4, 1, size))
    some = tuple((1, 1 + row) for row in range(33))
    yield Check("paged_attention", BF16, BF16, Case(some, 4, 2))
    for options in OPTIONS:
        yield Check("paged_attention", BF16, BF16, Case(ONE, 6, 2, **options))  # type: ignore[arg-type]


OPTIONS: list[dict[str, object]] = [
    {"window": 1},
    {"window": 16},
    {"window": 37},
    {"softcap": 5.0},
    {"slopes": True},
    {"slopes": True, "softcap": 20.0, "window": 50, "block_size": 8, "head_size": 80},
]


def prefills() -> Iterator[Check]:
    for at, (dtype, cached) in enumerate(ATTENDED):
        for turn, block_size in enumerate(BLOCKS):
            heads = ((2, 2), (3, 1), (8, 2))[(at + turn) % 3]
            size = (64, 80, 96, 112, 128, 192, 256)[(at + 2 * turn) % 7]
            yield Check("paged_attention", dtype, cached, Case(MIXED, *heads, size, block_size))
        whole = ((2048, 2048), (511, 511))
        yield Check("paged_attention", dtype, cached, Case(whole, 8, 2, 128), large=True)
        chunk = ((1024, 5000), (1, 300), (77, 4097))
        yield Check("paged_attention", dtype, cached, Case(chunk, 8, 2, 64), large=True)
    for length in (63, 64, 65, 129):
        yield Check("paged_attention", "float16", "float16", Case(((length, length),), 2, 2))
        yield Check("paged_attention", BF16, BF16, Case(((length // 2, length),), 4, 1))
    for options in OPTIONS:
        yield Check("paged_attention", BF16, BF16, Case(MIXED, 6, 2, **options))  # type: ignore[arg-type]


def likeliest() -> Iterator[Check]:
    for dtype in FLOATS:
        for size in (300, 1, 31, 5003):
            yield Check("greedy_logprob", dtype, None, Rows(4, size, apart=size > 4))
        yield Check("greedy_logprob", dtype, None, Rows(256, 128256), large=True)


def block_moves() -> Iterator[Check]:
    for dtype in (*FLOATS, *NARROW):
        for pairs, head_size in ((1, 64), (9, 20)):
            yield Check("copy_blocks", dtype, dtype, Blocks(pairs, head_size=head_size))
            for back in (False, True):
                shape = Blocks(min(pairs, 5), head_size=head_size, host=7, back=back)
                yield Check("swap_blocks", dtype, dtype, shape)
        large = Blocks(64, layers=16, blocks=300, heads=8, head_size=128)
        yield Check("copy_blocks", dtype, dtype, large, large=True)
        yield Check("swap_blocks", dtype, dtype, replace(large, host=100), large=True)


def drawn() -> Iterator[Check]:
    for dtype in FLOATS:
        for size in (400, 1, 5003):
            yield Check("sample", dtype, None, Logits(4, size))
        for seen in (300, 3):
            yield Check("penalties", dtype, None, Logits(4, 700, seen))
        yield Check("sample", dtype, None, Logits(256, 128256), large=True)
        yield Check("penalties", dtype, None, Logits(256, 128256, 4000), large=True)


def every() -> list[Check]:
    """The list, each combination's first shape before any second one: a run that is cut has seen the most."""
    families = (norms, activations, rotations, stores, decodes, prefills, likeliest, block_moves, drawn)
    return in_turns(check for family in families for check in family())


def combination(check: Check) -> Combination:
    return Combination(check.op, check.dtype, check.cache_dtype)


def in_turns(checks: Iterable[Check]) -> list[Check]:
    queues: dict[Combination, list[Check]] = {}
    for check in checks:
        queues.setdefault(combination(check), []).append(check)
    longest = max(len(queue) for queue in queues.values())
    return [queue[at] for at in range(longest) for queue in queues.values() if at < len(queue)]


def firsts(checks: Iterable[Check]) -> list[Check]:
    """The first shape of each combination that emulated kernels can be given."""
    found: dict[Combination, Check] = {}
    for check in checks:
        if not check.large:
            found.setdefault(combination(check), check)
    return list(found.values())


def tiny() -> list[Check]:
    """One small shape of every operation, with an 8-bit cache where it has one beside its own type."""
    found: dict[str, Check] = {}
    for check in firsts(every()):
        moved = check.op in MOVES and check.cache_dtype == NARROW[0]
        if moved or (check.dtype == BF16 and check.cache_dtype in (None, NARROW[0])):
            found.setdefault(check.op, check)
    return list(found.values())
