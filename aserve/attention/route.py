"""Attention on a device: which backend serves which rows.

Rows with one query go to the fixed-shape decode, or to aserve's own kernels where those may be used
(:mod:`aserve.ops.cuda`). All other rows go to one backend, chosen when a layer like this is first run, which
is at start: the first of own, varlen, xformers and sdpa that passes a self-test there against the last.
``ASERVE_ATTENTION_BACKEND`` names the one to use instead.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

from aserve.attention.backends import BACKENDS, Backend, Layer, Own
from aserve.attention.base import AttentionMetadata, KVCache
from aserve.attention.decode import decode
from aserve.attention.dense import NARROW, quantised
from aserve.attention.rows import Options, Rows, parts_of
from aserve.errors import ConfigError

VARIABLE = "ASERVE_ATTENTION_BACKEND"

logger = logging.getLogger(__name__)

# Rounding of the result, and of the weights where tensor cores multiply them, with some to spare: a wrong
# mask or head is off by far more.
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2 * 2**-7, torch.float16: 2 * 2**-10}


def check(device: torch.device) -> None:
    """ConfigError: the variable names no backend, or one that has no say on such a device."""
    wanted = _wanted()
    if wanted not in (None, "own") and device.type == "cpu":
        raise ConfigError(
            f"{VARIABLE}={wanted}: on the CPU aserve's own kernels attend, or torch with "
            "ASERVE_CPU_ISA=reference; unset it"
        )


def attend(
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
    """:func:`aserve.ops.paged_attention` on a device other than the CPU."""
    options = Options(scale, window, softcap, alibi_slopes, k_scale, v_scale)
    layer = Layer(
        q.dtype,
        cache[0].dtype,
        q.shape[1],
        cache[0].shape[1],
        q.shape[2],
        cache[0].shape[2],
        window is not None,
        softcap is not None,
        alibi_slopes is not None,
    )
    if meta.graph:
        rows = Rows(meta.query_start, meta.seq_lens, meta.block_tables, [1], [meta.max_seq_len])
        return _decode(q, cache, rows, options, layer)
    parts = parts_of(meta)
    if parts.prefill is None and parts.decode is not None:
        return _decode(q, cache, parts.decode, options, layer)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    first = parts.first_decode
    if parts.prefill is not None:
        out[:first] = choose(layer, q.device).attend(q[:first], cache, parts.prefill, options)
    if parts.decode is not None:
        out[first:] = _decode(q[first:], cache, parts.decode, options, layer)
    return out


def _decode(q: torch.Tensor, cache: KVCache, rows: Rows, options: Options, layer: Layer) -> torch.Tensor:
    own = _own(layer, q.device)
    if own is not None:
        return own.attend(q, cache, rows, options)
    return decode(
        q,
        cache,
        rows.block_tables,
        rows.seq_lens,
        options.scale,
        window=options.window,
        softcap=options.softcap,
        alibi_slopes=options.alibi_slopes,
        k_scale=options.k_scale,
        v_scale=options.v_scale,
    )


@cache
def _own(layer: Layer, device: torch.device) -> Backend | None:
    """aserve's kernels where they may serve such a layer."""
    own = Own()
    return own if own.refusal(layer, device) is None else None


@cache
def choose(layer: Layer, device: torch.device) -> Backend:
    """The backend of rows with several queries. ConfigError: the one that the variable names cannot serve."""
    wanted = _wanted()
    for backend in [BACKENDS[wanted]] if wanted else BACKENDS.values():
        reason = backend.refusal(layer, device) or _failure(backend, layer, device)
        if reason is None:
            logger.info("attention of prompts: %s, for %s", backend.name, layer)
            return backend
        if wanted:
            raise ConfigError(f"{VARIABLE}={wanted} cannot serve this model here: {reason}")
        logger.info("attention of prompts: not %s: %s", backend.name, reason)
    raise ConfigError("no attention backend serves this model")  # not reached: the last serves everything


def _wanted() -> str | None:
    wanted = os.environ.get(VARIABLE) or None
    if wanted is not None and wanted not in BACKENDS:
        raise ConfigError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}, is {wanted!r}")
    return wanted


def _failure(backend: Backend, layer: Layer, device: torch.device) -> str | None:
    """Why a backend does not pass the self-test, or None where it does."""
    if backend.name == "sdpa":
        return None
    q, cache, rows, options = _case(layer, device)
    try:
        got = backend.attend(q, cache, rows, options).float()
    except Exception as error:  # whatever a library raises where it cannot run
        said = str(error).strip().split("\n")[0].split(". ")[0]
        return f"its self-test failed ({type(error).__name__}: {said[:200]})"
    wide = (cache[0], cache[1]) if layer.cache_dtype in NARROW else (cache[0].float(), cache[1].float())
    want = BACKENDS["sdpa"].attend(q.float(), wide, rows, options)
    most = 4.0 * options.v_scale
    off = (got - want).abs().max().item()
    # Not `>`: NaN fails too.
    if not off <= _TOLERANCE[layer.dtype] * most:
        return f"its self-test was off by {off:.2g}"
    return None


def _case(layer: Layer, device: torch.device) -> tuple[torch.Tensor, KVCache, Rows, Options]:
    """Four rows: a whole prompt, a chunk behind a cached prefix, a decode, another prompt."""
    query_lens, lengths = [5, 9, 1, 3], [5, 40, 17, 3]
    random = torch.Generator().manual_seed(0)
    counts = [-(-length // layer.block_size) for length in lengths]
    order = torch.randperm(sum(counts), generator=random).int()
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    at = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[at : at + count]
        at += count
    shape = (len(order), layer.num_kv_heads, layer.block_size, layer.head_size)
    narrow = layer.cache_dtype in NARROW
    k_scale, v_scale = (0.5, 2.0) if narrow else (1.0, 1.0)
    sides = []
    for factor in (k_scale, v_scale):
        values = torch.randn(shape, generator=random).clamp(-4, 4)
        side = quantised(values, layer.cache_dtype, factor) if narrow else values.to(layer.cache_dtype)
        sides.append(side.to(device))
    q = torch.randn(sum(query_lens), layer.num_heads, layer.head_size, generator=random)
    slopes = 2.0 ** -torch.arange(1, layer.num_heads + 1, dtype=torch.float32)
    starts = torch.tensor([0, *query_lens]).cumsum(0, dtype=torch.int32)
    rows = Rows(
        starts.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        tables.to(device),
        query_lens,
        lengths,
    )
    options = Options(
        layer.head_size**-0.5,
        7 if layer.window else None,
        5.0 if layer.softcap else None,
        slopes.to(device) if layer.alibi else None,
        k_scale,
        v_scale,
    )
    return q.to(device, layer.dtype), (sides[0], sides[1]), rows, options
