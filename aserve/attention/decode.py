"""Decode attention in torch with fixed shapes: nothing is read on the host, so a CUDA graph can hold it."""

from __future__ import annotations

import torch

from aserve.attention.base import KVCache
from aserve.attention.dense import attend, narrow, taken


def decode(
    q: torch.Tensor,
    cache: KVCache,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Attention of one query a row, q ``[B, Hq, D]``, over the first ``seq_lens`` (int32 ``[B]``, at least 1)
    cached tokens of its blocks, ``block_tables`` int32 ``[B, W]``. Returns ``[B, Hq, D]``.

    Every row costs what one of ``W`` full blocks does. The options are those of
    :func:`aserve.ops.paged_attention`.
    """
    block_size = cache[0].shape[2]
    lengths = seq_lens.unsqueeze(1)
    positions = torch.arange(block_tables.shape[1] * block_size, device=q.device, dtype=torch.int32)
    # Hazard: what lies past a row's end is another row's, perhaps NaN, which a weight of zero would not
    # silence. Its own last token is read there instead, and hidden by the mask.
    places = torch.minimum(positions, lengths - 1)
    blocks = block_tables.gather(1, (places // block_size).long())
    keys, values = taken(cache, blocks, places % block_size, q.dtype)
    out = attend(
        q.unsqueeze(1),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        lengths - 1,
        scale * k_scale if narrow(cache) else scale,
        window,
        softcap,
        alibi_slopes,
    ).squeeze(1)
    return out * v_scale if narrow(cache) and v_scale != 1.0 else out
