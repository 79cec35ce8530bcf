"""The operations models are written in; the only door to the native extension.

Each function runs the native kernel when the loaded extension offers it for these tensors, and the
reference in :mod:`aserve.ops.reference` otherwise. Both have the same signature and meaning.
"""

from __future__ import annotations

from aserve.ops.reference import (
    copy_blocks,
    fused_add_rms_norm,
    gelu_and_mul,
    paged_attention,
    rms_norm,
    rotary_embedding,
    silu_and_mul,
    store_kv,
)

__all__ = [
    "copy_blocks",
    "fused_add_rms_norm",
    "gelu_and_mul",
    "paged_attention",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "store_kv",
]
