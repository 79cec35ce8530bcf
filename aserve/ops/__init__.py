"""The operations models are written in; the only door to the native extension.

Each function runs the native kernel when the loaded extension offers it for these tensors, and the
reference in :mod:`aserve.ops.reference` otherwise. Both have the same signature and meaning; the
reference's docstring gives it. ``ASERVE_CPU_ISA=reference`` keeps to the references, ``avx2`` and
``avx512`` force a level of the native kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aserve.ops import native, reference

_chosen = reference if native.load() == "reference" else native

if TYPE_CHECKING:
    from aserve.ops.reference import (
        copy_blocks,
        fused_add_rms_norm,
        gelu_and_mul,
        greedy_allowed,
        greedy_logprob,
        paged_attention,
        penalties,
        rms_norm,
        rope_and_store,
        rotary_embedding,
        sample,
        samples,
        silu_and_mul,
        store_kv,
        swap_blocks,
    )
else:
    copy_blocks = _chosen.copy_blocks
    fused_add_rms_norm = _chosen.fused_add_rms_norm
    gelu_and_mul = _chosen.gelu_and_mul
    greedy_allowed = _chosen.greedy_allowed
    greedy_logprob = _chosen.greedy_logprob
    paged_attention = _chosen.paged_attention
    penalties = _chosen.penalties
    rms_norm = _chosen.rms_norm
    rope_and_store = _chosen.rope_and_store
    rotary_embedding = _chosen.rotary_embedding
    sample = _chosen.sample
    samples = _chosen.samples
    silu_and_mul = _chosen.silu_and_mul
    store_kv = _chosen.store_kv
    swap_blocks = _chosen.swap_blocks
kernels = native.report

__all__ = [
    "copy_blocks",
    "fused_add_rms_norm",
    "gelu_and_mul",
    "greedy_allowed",
    "greedy_logprob",
    "kernels",
    "paged_attention",
    "penalties",
    "rms_norm",
    "rope_and_store",
    "rotary_embedding",
    "sample",
    "samples",
    "silu_and_mul",
    "store_kv",
    "swap_blocks",
]
