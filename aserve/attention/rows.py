"""A step's rows as an attention backend takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from aserve.attention.base import AttentionMetadata, KVCache
from aserve.attention.dense import narrow, taken


@dataclass(frozen=True, slots=True)
class Options:
    """What a layer's attention is besides its tensors, as :func:`aserve.ops.paged_attention` takes it."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0


@dataclass(slots=True)
class Rows:
    """Neighbouring rows of a step.

    query_start: int32 ``[B + 1]``, from 0. seq_lens: int32 ``[B]``. block_tables: int32 ``[B, W]``.
    query_lens, lengths: the queries and the whole length of each row, on the host.
    kept: whatever a backend makes of these rows once, for all layers.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    query_lens: list[int]
    lengths: list[int]
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def max_query_len(self) -> int:
        return max(self.query_lens)

    @property
    def max_seq_len(self) -> int:
        return max(self.lengths)

    def key_start(self, block_size: int) -> torch.Tensor:
        """int32 ``[B + 1]``: where each row's keys begin among all rows' keys, one row behind the other."""
        start: torch.Tensor = self._places(block_size)[0]
        return start

    def keys_and_values(self, cache: KVCache, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows' keys and values out of the cache, ``[K, Hkv, D]`` each, of dtype; an 8-bit cache's
        without their scale."""
        _, blocks, offsets = self._places(cache[0].shape[2])
        keys, values = taken(cache, blocks, offsets, dtype)
        return keys.to(dtype), values.to(dtype)

    def _places(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        places: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = self.kept.get("places")
        if places is None:
            device, total = self.seq_lens.device, sum(self.lengths)
            start = torch.zeros(len(self.lengths) + 1, dtype=torch.int32, device=device)
            torch.cumsum(self.seq_lens, 0, dtype=torch.int32, out=start[1:])
            rows = torch.arange(len(self.lengths), device=device)
            # The size is told, or the device would be asked for it.
            row = rows.repeat_interleave(self.seq_lens.long(), output_size=total)
            position = torch.arange(total, device=device) - start[row]
            blocks = self.block_tables[row, position // block_size].long()
            places = self.kept["places"] = (start, blocks, position % block_size)
        return places


@dataclass(slots=True)
class Parts:
    """The prefill rows of a step, and the decode rows behind them, which begin at token ``first_decode``."""

    prefill: Rows | None
    decode: Rows | None
    first_decode: int


def parts_of(meta: AttentionMetadata) -> Parts:
    """The step's parts; made once for all layers."""
    if isinstance(meta.parts, Parts):
        return meta.parts
    start, lengths = meta.query_start_host, meta.seq_lens_host
    count = len(lengths) - meta.num_decode_rows
    query_lens = [end - begin for begin, end in pairwise(start)]
    prefill = decode = None
    if count:
        prefill = Rows(
            meta.query_start[: count + 1],
            meta.seq_lens[:count],
            meta.block_tables[:count],
            query_lens[:count],
            lengths[:count],
        )
    if meta.num_decode_rows:
        decode = Rows(
            meta.query_start[count:] - start[count] if count else meta.query_start,
            meta.seq_lens[count:],
            meta.block_tables[count:],
            query_lens[count:],
            lengths[count:],
        )
    meta.parts = parts = Parts(prefill, decode, start[count])
    return parts


def scaled(options: Options, cache: KVCache) -> float:
    """The factor of the scores, an 8-bit cache's scale included."""
    return options.scale * options.k_scale if narrow(cache) else options.scale


def rescaled(out: torch.Tensor, options: Options, cache: KVCache) -> torch.Tensor:
    """A result whose values came without their 8-bit cache's scale."""
    return out * options.v_scale if narrow(cache) and options.v_scale != 1.0 else out
