"""Attention over gathered keys and values in plain torch, and how to gather them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from aserve.attention.base import KVCache

NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
"""The 8-bit types of a KV cache; a cache of these holds values divided by its scale."""


def narrow(cache: KVCache) -> bool:
    """Whether the cache is an 8-bit one."""
    return cache[0].dtype in NARROW


def taken(
    cache: KVCache, blocks: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the tokens at those places, each ``[..., Hkv, D]`` for places ``[...]``.

    An 8-bit cache is widened to ``dtype``, exactly and without its scale; any other is taken as it is.
    """
    sides = []
    for side in cache:
        if side.dtype in NARROW:
            # As bytes: not every torch indexes 8-bit floats.
            sides.append(side.view(torch.uint8)[blocks, :, offsets].view(side.dtype).to(dtype))
        else:
            sides.append(side[blocks, :, offsets])
    return sides[0], sides[1]


def quantised(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """``x / scale`` as an 8-bit type, saturated: torch's own conversion makes NaN of what is too large."""
    most = torch.finfo(dtype).max
    return (x.float() * (1.0 / scale)).clamp(-most, most).to(dtype)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    q_pos: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: torch.Tensor | None,
) -> torch.Tensor:
    """q ``[B, Q, Hq, D]`` at positions ``q_pos`` ``[B, Q]`` over keys/values ``[B, Hkv, L, D]``."""
    batch, num_queries, num_heads, head_size = q.shape
    num_kv_heads, length = keys.shape[1], keys.shape[2]
    distance = q_pos.unsqueeze(-1) - torch.arange(length, device=q.device)
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    group = num_heads // num_kv_heads
    query = q.permute(0, 2, 1, 3)
    if softcap is None and alibi_slopes is None:
        # Heads of a group become queries: no copy of the keys, and one matrix product per KV head.
        folded = query.reshape(batch, num_kv_heads, group * num_queries, head_size)
        mask = visible.unsqueeze(1).repeat(1, 1, group, 1)
        result = F.scaled_dot_product_attention(
            folded, keys.to(q.dtype), values.to(q.dtype), attn_mask=mask, scale=scale
        )
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        folded = query.reshape(batch, num_kv_heads, group, num_queries, head_size).to(wide)
        scores = torch.einsum("bkgqd,bkld->bkgql", folded, keys.to(wide)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            slopes = alibi_slopes.view(1, num_kv_heads, group, 1, 1)
            scores = scores - slopes * distance.view(batch, 1, 1, num_queries, length)
        scores = scores.masked_fill(~visible.view(batch, 1, 1, num_queries, length), float("-inf"))
        result = torch.einsum("bkgql,bkld->bkgqd", scores.softmax(-1), values.to(wide)).to(q.dtype)
    return result.reshape(batch, num_heads, num_queries, head_size).permute(0, 2, 1, 3)
