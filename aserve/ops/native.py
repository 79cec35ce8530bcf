"""The native kernels behind the operations: loading, and calls with outputs made here.

Every function has the signature and meaning of its namesake in :mod:`aserve.ops.reference`, and hands
tensors the kernels do not serve (other devices, other dtypes) to it. The kernels check shapes and
strides themselves and raise RuntimeError.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from aserve.attention import route
from aserve.attention.base import AttentionMetadata, KVCache
from aserve.errors import ConfigError
from aserve.ops import cuda, reference

LIBRARY = Path(__file__).resolve().parent.parent / "_lib" / "libaserve_cpu.so"
LEVEL_VARIABLE = "ASERVE_CPU_ISA"
LEVELS = ("avx2", "avx512")
OPERATIONS = (
    "copy_blocks",
    "fused_add_rms_norm",
    "gelu_and_mul",
    "greedy_allowed",
    "greedy_logprob",
    "paged_attention",
    "penalties",
    "rms_norm",
    "rope_and_store",
    "rotary_embedding",
    "sample",
    "silu_and_mul",
    "store_kv",
    "swap_blocks",
)

logger = logging.getLogger(__name__)

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_KERNELS = (
    "copy_blocks",
    "decoder_cache",
    "decoder_ends",
    "decoder_forward",
    "decoder_greedy",
    "decoder_layer",
    "decoder_stack",
    "decoder_weight",
    "fused_add_rms_norm",
    "gated",
    "greedy_allowed",
    "greedy_logprob",
    "pack_dense",
    "pack_gguf",
    "packed_linear",
    "packed_rows",
    "paged_attention",
    "penalties",
    "rms_norm",
    "rope_and_store",
    "rotary_embedding",
    "sample",
    "store_kv",
    "swap_blocks",
)
_SILU, _GELU_TANH, _GELU_ERF = 0, 1, 2
_CONTIGUOUS = torch.contiguous_format


class _Library:
    """The loaded library's operations, each bound past the per-call search of ``torch.ops``."""

    def __init__(self, path: Path) -> None:
        ops: Any = torch.ops
        ops.load_library(str(path))
        self.functions = ctypes.CDLL(str(path))
        self.functions.aserve_cpu_isa.restype = ctypes.c_char_p
        self.functions.aserve_cpu_select.argtypes = [ctypes.c_char_p]
        self.functions.aserve_packed_bytes.restype = ctypes.c_int64
        self.functions.aserve_packed_bytes.argtypes = [ctypes.c_int64] * 3
        self.functions.aserve_decoder_bytes.restype = ctypes.c_int64
        self.functions.aserve_decoder_bytes.argtypes = [ctypes.c_int64]
        operations = ops.aserve
        self.copy_blocks = operations.copy_blocks.default
        self.decoder_cache = operations.decoder_cache.default
        self.decoder_ends = operations.decoder_ends.default
        self.decoder_forward = operations.decoder_forward.default
        self.decoder_greedy = operations.decoder_greedy.default
        self.decoder_layer = operations.decoder_layer.default
        self.decoder_stack = operations.decoder_stack.default
        self.decoder_weight = operations.decoder_weight.default
        self.fused_add_rms_norm = operations.fused_add_rms_norm.default
        self.gated = operations.gated.default
        self.greedy_allowed = operations.greedy_allowed.default
        self.greedy_logprob = operations.greedy_logprob.default
        self.pack_dense = operations.pack_dense.default
        self.pack_gguf = operations.pack_gguf.default
        self.packed_linear = operations.packed_linear.default
        self.packed_rows = operations.packed_rows.default
        self.paged_attention = operations.paged_attention.default
        self.penalties = operations.penalties.default
        self.rms_norm = operations.rms_norm.default
        self.rope_and_store = operations.rope_and_store.default
        self.rotary_embedding = operations.rotary_embedding.default
        self.sample = operations.sample.default
        self.store_kv = operations.store_kv.default
        self.swap_blocks = operations.swap_blocks.default
        # After the search: of an operation that the library lacks it is that which tells.
        for name in _KERNELS:
            torch.library.register_fake(f"aserve::{name}", _writes_only)

    def level(self) -> str:
        """The instruction-set level in use, or "none" where the CPU has no level the library knows."""
        return str(self.functions.aserve_cpu_isa().decode())

    def select(self, level: str) -> bool:
        return bool(self.functions.aserve_cpu_select(level.encode()))

    def packed_bytes(self, format: int, rows: int, columns: int) -> int:
        """Bytes of a packed matrix; -1: no such format, or not for so many columns."""
        return int(self.functions.aserve_packed_bytes(format, rows, columns))


def _writes_only(*tensors: Any) -> None:
    """What every kernel returns: outputs are arguments."""


def load() -> str:
    """Loads the library and chooses the level, once per process.

    Returns the level, or "reference" where the kernels are not used: no library has been built, it does
    not load, the CPU is too old, or ``ASERVE_CPU_ISA=reference``. ConfigError: the variable names a level
    that is unknown or that this CPU lacks.
    """
    global _library
    wanted = os.environ.get(LEVEL_VARIABLE, "auto")
    if wanted not in ("auto", "reference", *LEVELS):
        raise ConfigError(f"{LEVEL_VARIABLE} must be auto, reference, {' or '.join(LEVELS)}, is {wanted!r}")
    if wanted == "reference" or why_missing() is not None:
        return "reference"
    library = _open()
    if wanted != "auto" and not library.select(wanted):
        raise ConfigError(f"{LEVEL_VARIABLE}={wanted}: this CPU does not have it")
    if library.level() == "none":
        return "reference"
    _library = library
    return library.level()


def select(level: str) -> None:
    """Changes the level in use ("auto", "avx2", "avx512"). ConfigError: not available here."""
    if _library is None or not _library.select(level):
        raise ConfigError(f"there are no native kernels at the level {level!r} here")


def level() -> str:
    """The level in use now, or "reference"."""
    return "reference" if _library is None else _library.level()


def library() -> Any:
    """The library in use, or None."""
    return _library


@cache
def why_missing() -> str | None:
    """Why the library cannot be used, or None where it can."""
    if not LIBRARY.exists():
        return "it has not been built"
    try:
        _open()
    except OSError as error:
        return str(error.__cause__ or error)  # torch wraps the loader's own words
    except AttributeError as error:
        return f"it was built from other sources ({error})"
    return None


@cache
def _open() -> _Library:
    return _Library(LIBRARY)


@cache
def report() -> dict[str, str]:
    """Which implementation each operation has ("native" or "reference") and the level as "isa".

    The first call logs a line when the native kernels are missing.
    """
    now = level()
    reason = why_missing()
    if now == "reference" and reason is not None and os.environ.get(LEVEL_VARIABLE) != "reference":
        logger.warning(
            "native kernels are off, the slower torch operations serve instead: %s (%s); "
            "build them with: python setup_ext.py",
            LIBRARY.name,
            reason,
        )
    kind = "reference" if now == "reference" else "native"
    return {"isa": now, **dict.fromkeys(OPERATIONS, kind)}


_library: _Library | None = None


def _kernels(x: torch.Tensor, op: str = "", cache: torch.Tensor | None = None) -> Any:
    """The operations where a kernel serves this tensor; those of the CUDA library, by their names there."""
    if x.is_cpu:
        served = x.dtype in _DTYPES and (cache is None or cache.dtype in _DTYPES)
        return _library if served else None
    if op and x.is_cuda and cuda.serves(op, x.dtype, None if cache is None else cache.dtype, x.get_device()):
        return _library
    return None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    kernels = _kernels(x, "rms_norm")
    if kernels is None:
        return reference.rms_norm(x, weight, eps)
    out = torch.empty_like(x, memory_format=_CONTIGUOUS)
    kernels.rms_norm(x, weight, eps, out)
    return out


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    kernels = _kernels(x, "fused_add_rms_norm")
    if kernels is None:
        return reference.fused_add_rms_norm(x, residual, weight, eps)
    out = torch.empty_like(x, memory_format=_CONTIGUOUS)
    total = torch.empty_like(x, memory_format=_CONTIGUOUS)
    kernels.fused_add_rms_norm(x, residual, weight, eps, out, total)
    return out, total


def rotary_embedding(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    kernels = _kernels(q, "rotary_embedding")
    if kernels is None:
        return reference.rotary_embedding(q, k, positions, cos_sin, interleaved)
    q_out = torch.empty_like(q, memory_format=_CONTIGUOUS)
    k_out = torch.empty_like(k, memory_format=_CONTIGUOUS)
    kernels.rotary_embedding(q, k, positions, cos_sin, interleaved, q_out, k_out)
    return q_out, k_out


def rope_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    kernels = _kernels(q, "rope_and_store", cache[0])
    if kernels is None:
        return reference.rope_and_store(
            q, k, v, positions, cos_sin, cache, slot_mapping, interleaved, k_scale, v_scale
        )
    out = torch.empty_like(q, memory_format=_CONTIGUOUS)
    kernels.rope_and_store(
        q,
        k,
        v,
        positions,
        cos_sin,
        interleaved,
        cache[0],
        cache[1],
        slot_mapping,
        k_scale,
        v_scale,
        out,
    )
    return out


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    kernels = _kernels(k, "store_kv", cache[0])
    if kernels is None:
        reference.store_kv(k, v, cache, slot_mapping, k_scale, v_scale)
    else:
        kernels.store_kv(k, v, cache[0], cache[1], slot_mapping, k_scale, v_scale)


def paged_attention(
    q: torch.Tensor,
    cache: KVCache,
    meta: AttentionMetadata,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    head_size = q.shape[-1]
    kernels = _kernels(q, "", cache[0]) if head_size % 8 == 0 and head_size <= 256 else None
    if kernels is None:
        attend = route.attend if q.is_cuda else reference.paged_attention
        return attend(
            q,
            cache,
            meta,
            scale,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    out = torch.empty_like(q, memory_format=_CONTIGUOUS)
    kernels.paged_attention(
        q,
        cache[0],
        cache[1],
        meta.query_start,
        meta.seq_lens,
        meta.block_tables,
        scale,
        window or 0,
        softcap or 0.0,
        alibi_slopes,
        k_scale,
        v_scale,
        meta.max_query_len,
        out,
    )
    return out


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    kernels = _kernels(x, "gated")
    return reference.silu_and_mul(x) if kernels is None else _gated(kernels, x, _SILU)


def gelu_and_mul(x: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    kernels = _kernels(x, "gated")
    if kernels is None:
        return reference.gelu_and_mul(x, approximate)
    return _gated(kernels, x, _GELU_TANH if approximate == "tanh" else _GELU_ERF)


def _gated(kernels: Any, x: torch.Tensor, activation: int) -> torch.Tensor:
    shape = x.shape
    out = x.new_empty((*shape[:-1], shape[-1] // 2))
    kernels.gated(x, activation, out)
    return out


def copy_blocks(caches: list[KVCache], pairs: list[tuple[int, int]]) -> None:
    if not caches or not pairs:
        return
    kernels = _kernels(caches[0][0], "copy_blocks", caches[0][0])
    if kernels is None:
        reference.copy_blocks(caches, pairs)
        return
    kernels.copy_blocks([side for sides in caches for side in sides], torch.tensor(pairs, dtype=torch.int64))


def swap_blocks(source: list[KVCache], target: list[KVCache], pairs: list[tuple[int, int]]) -> None:
    if not source or not pairs:
        return
    sides, others = ([side for layer in cache for side in layer] for cache in (source, target))
    # Between a device and the host the device's kernels serve, which reach pinned memory of the host's.
    device_side = others[0] if others[0].is_cuda else sides[0]
    kernels = _kernels(device_side, "swap_blocks", device_side)
    if kernels is None or (device_side.is_cuda and not _reached(sides[0], others[0])):
        reference.swap_blocks(source, target, pairs)
        return
    kernels.swap_blocks(sides, others, torch.tensor(pairs, dtype=torch.int64))


def _reached(*tensors: torch.Tensor) -> bool:
    return all(each.is_cuda or each.is_pinned() for each in tensors)


def greedy_allowed(logits: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kernels = _kernels(logits) if logits.device.type == "cpu" and logits.dtype == torch.float32 else None
    if kernels is None:
        return reference.greedy_allowed(logits, allowed)
    rows = logits.shape[0]
    token = torch.empty(rows, dtype=torch.int64)
    logprob = torch.empty(rows, dtype=torch.float32)
    kernels.greedy_allowed(logits, allowed, token, logprob)
    return token, logprob


def greedy_logprob(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kernels = _kernels(logits, "greedy_logprob")
    if kernels is None:
        return reference.greedy_logprob(logits)
    rows = logits.shape[0]
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    kernels.greedy_logprob(logits, token, logprob)
    return token, logprob


def penalties(
    logits: torch.Tensor,
    starts: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> None:
    kernels = _kernels(logits, "penalties")
    if kernels is None or (logits.is_cpu and logits.dtype != torch.float32):
        reference.penalties(logits, starts, ids, counts, repetition, frequency, presence)
    else:
        kernels.penalties(logits, starts, ids, counts, repetition, frequency, presence)


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    kernels = _kernels(logits, "sample")
    if kernels is None or (logits.is_cpu and logits.dtype != torch.float32):
        return reference.sample(logits, temperature, seeds, positions)
    rows = logits.shape[0]
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    kernels.sample(logits, temperature, seeds, positions, token, logprob)
    return token, logprob


def samples(device: torch.device) -> bool:
    """Whether :func:`sample` is one pass of that device's kernel over float32 logits."""
    if device.type != "cuda" or _library is None:
        return False
    return cuda.serves("sample", torch.float32, None, device.index or 0)
