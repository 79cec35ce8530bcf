"""What an attention layer needs to know about a step besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

KVCache = tuple[torch.Tensor, torch.Tensor]
"""One layer's keys and values, each ``[num_blocks, num_kv_heads, block_size, head_size]``."""


@dataclass(slots=True)
class AttentionMetadata:
    """Where the tokens of a step belong.

    The step's ``T`` tokens are the concatenation of ``B`` rows; row ``i`` holds tokens
    ``query_start[i] : query_start[i + 1]`` and, counting what is already cached, its sequence is
    ``seq_lens[i]`` tokens long after this step. A row's queries are the last positions of its sequence.

    query_start: int32 ``[B + 1]``.
    seq_lens: int32 ``[B]``.
    block_tables: int32 ``[B, max_blocks]``; entries past a row's length are arbitrary valid ids.
    slot_mapping: int64 ``[T]``; token ``t`` is stored at block ``slot_mapping[t] // block_size``,
        offset ``slot_mapping[t] % block_size``.
    max_query_len, max_seq_len: the largest row and sequence, known on the host.
    num_decode_rows: the last rows of the batch with exactly one query each.

    graph: the pass is captured in a CUDA graph, or is a warm-up for that. Then every row is a decode row,
        nothing here is read on the host but shapes and these integers, and nothing is kept from one layer
        to the next: a replay reads what the tensors hold by then. ``max_blocks`` is the bucket's, so is
        ``B``; ``num_decode_rows`` is ``B``, ``max_query_len`` 1, the host's lists may be empty. A row that
        only fills the bucket has a ``seq_lens`` of 1, valid block ids, and a slot in a block that belongs
        to nobody.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int
    max_seq_len: int
    num_decode_rows: int
    query_start_host: list[int]
    seq_lens_host: list[int]
    graph: bool = False
    parts: Any = field(default=None, init=False, repr=False, compare=False)
    """What :mod:`aserve.attention.rows` makes of this once, for all layers."""
