"""The attention every decoder shares, on projected queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aserve import ops
from aserve.attention.base import AttentionMetadata, KVCache
from aserve.model.layers.rotary import Rotary


@dataclass(slots=True)
class PagedAttention:
    """Rotates, stores keys and values in the paged cache, and attends over it.

    scale: factor of the scores. window, softcap: see :func:`aserve.ops.paged_attention`.
    rotary: None for models with learned positions.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    rotary: Rotary | None = None
    window: int | None = None
    softcap: float | None = None

    def apply(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        """q ``[T, Hq, D]``, k and v ``[T, Hkv, D]``; returns ``[T, Hq * D]``."""
        if self.rotary is None:
            ops.store_kv(k, v, cache, meta.slot_mapping)
        else:
            q = ops.rope_and_store(q, k, v, positions, self.rotary.cos_sin, cache, meta.slot_mapping)
        out = ops.paged_attention(q, cache, meta, self.scale, window=self.window, softcap=self.softcap)
        return out.reshape(q.shape[0], self.num_heads * self.head_size)

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of a merged projection ``[T, (Hq + 2 Hkv) * D]`` as q, k and v by head."""
        heads = qkv.view(qkv.shape[0], -1, self.head_size)
        first_v = self.num_heads + self.num_kv_heads
        return heads[:, : self.num_heads], heads[:, self.num_heads : first_v], heads[:, first_v:]
