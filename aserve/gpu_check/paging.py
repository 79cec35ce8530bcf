"""Random paged batches, and attention over them written out in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from aserve.attention.base import AttentionMetadata, KVCache


@dataclass(frozen=True)
class Case:
    """rows: (tokens of this step, sequence length). slopes: use ALiBi. spare: table columns no row needs."""

    rows: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    slopes: bool = False
    spare: int = 2

    def __str__(self) -> str:
        extras = "".join(
            f"-{name}{value}"
            for name, value in (("window", self.window), ("softcap", self.softcap), ("alibi", self.slopes))
            if value
        )
        rows = ",".join(f"{tokens}/{length}" for tokens, length in self.rows)
        extras += f"-spare{self.spare}" if self.spare != 2 else ""
        return f"{rows}-h{self.heads}/{self.kv_heads}x{self.head_size}-b{self.block_size}{extras}"


@dataclass
class Batch:
    case: Case
    q: torch.Tensor
    cache: KVCache
    meta: AttentionMetadata
    keys: list[torch.Tensor]  # of each row, [length, kv_heads, head_size]
    values: list[torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.case.head_size)

    def row(self, index: int, first: int = 0, last: int | None = None) -> Batch:
        """Row ``index`` as a batch of its own, with its tokens ``first : last`` alone."""
        tokens, length = self.case.rows[index]
        last = tokens if last is None else last
        start, end = self.meta.query_start_host[index] + first, self.meta.query_start_host[index] + last
        seen = length - tokens + last
        case = replace(self.case, rows=((last - first, seen),))
        meta = metadata(case.rows, self.meta.block_tables[index : index + 1])
        return replace(self, case=case, q=self.q[start:end], meta=meta)


def metadata(rows: tuple[tuple[int, int], ...], tables: torch.Tensor) -> AttentionMetadata:
    starts = [0]
    for tokens, _ in rows:
        starts.append(starts[-1] + tokens)
    lengths = [length for _, length in rows]
    decode = 0
    for tokens, _ in reversed(rows):
        if tokens != 1:
            break
        decode += 1
    return AttentionMetadata(
        query_start=torch.tensor(starts, dtype=torch.int32, device=tables.device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=tables.device),
        block_tables=tables,
        slot_mapping=torch.zeros(starts[-1], dtype=torch.int64, device=tables.device),
        max_query_len=max(tokens for tokens, _ in rows),
        max_seq_len=max(lengths),
        num_decode_rows=decode,
        query_start_host=starts,
        seq_lens_host=lengths,
    )


def make(
    case: Case, dtype: torch.dtype, seed: int = 0, room: Case | None = None, device: str = "cpu"
) -> Batch:
    """A batch whose blocks are scattered and whose cache is NaN wherever nothing was stored.

    room: the case whose rows the cache and the tables have room for, this one by default.
    """
    random = torch.Generator(device).manual_seed(seed)
    most = [-(-length // case.block_size) for _, length in (room or case).rows]
    counts = [-(-length // case.block_size) for _, length in case.rows]
    total, widest = sum(most) + 3, max(most) + case.spare
    order = torch.randperm(total, generator=random, device=device).int()
    # Ids past a row's end are arbitrary.
    tables = torch.randint(
        0, total, (len(case.rows), widest), generator=random, dtype=torch.int32, device=device
    )
    shape = (total, case.kv_heads, case.block_size, case.head_size)
    cache = (
        torch.full(shape, math.nan, dtype=dtype, device=device),
        torch.full(shape, math.nan, dtype=dtype, device=device),
    )
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    at = 0
    for row, (_, length) in enumerate(case.rows):
        tables[row, : counts[row]] = order[at : at + counts[row]]
        at += counts[row]
        position = torch.arange(length, device=device)
        blocks = tables[row].long()[position // case.block_size]
        for side, kept in zip(cache, (keys, values), strict=True):
            written = torch.randn(length, case.kv_heads, case.head_size, generator=random, device=device).to(
                dtype
            )
            side[blocks, :, position % case.block_size] = written
            kept.append(written)
    tokens = sum(tokens for tokens, _ in case.rows)
    # Queries are a strided view, as those out of a merged projection are.
    merged = torch.randn(
        tokens, case.heads + 2 * case.kv_heads, case.head_size, generator=random, device=device
    ).to(dtype)
    options: dict[str, Any] = {"window": case.window, "softcap": case.softcap}
    if case.slopes:
        options["alibi_slopes"] = 2.0 ** -torch.arange(1, case.heads + 1, dtype=torch.float32, device=device)
    return Batch(case, merged[:, : case.heads], cache, metadata(case.rows, tables), keys, values, options)


def exact(batch: Batch) -> torch.Tensor:
    """Attention of the batch in float64, row by row. A query that sees no key gets zeros."""
    case = batch.case
    out = torch.zeros(batch.q.shape, dtype=torch.float64, device=batch.q.device)
    group = case.heads // case.kv_heads
    for row, (tokens, length) in enumerate(case.rows):
        start = batch.meta.query_start_host[row]
        if tokens == 0 or length == 0:
            continue
        place = torch.arange(length, device=out.device)
        distance = place[length - tokens :].unsqueeze(1) - place
        hidden = distance < 0
        if case.window is not None:
            hidden |= distance >= case.window
        q = batch.q[start : start + tokens].double().reshape(tokens, case.kv_heads, group, -1)
        keys, values = batch.keys[row].double(), batch.values[row].double()
        scores = torch.einsum("tkgd,lkd->kgtl", q, keys) * batch.scale
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        if case.slopes:
            slopes = batch.options["alibi_slopes"].double().view(case.kv_heads, group, 1, 1)
            scores = scores - slopes * distance
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out[start : start + tokens] = torch.einsum("kgtl,lkd->tkgd", weights, values).flatten(1, 2)
    return out


def narrowed(batch: Batch, dtype: torch.dtype, k_scale: float = 1.0, v_scale: float = 1.0) -> Batch:
    """The batch with an 8-bit cache of those scales; its keys and values, in float64 where the cache is
    scaled, are what that cache stands for."""
    most = torch.finfo(dtype).max

    def narrow(x: torch.Tensor, scale: float) -> torch.Tensor:
        return (x.float() / scale).clamp(-most, most).to(dtype)

    sides = tuple(narrow(side, scale) for side, scale in zip(batch.cache, (k_scale, v_scale), strict=True))
    kept = [
        [narrow(v, scale) if scale == 1 else narrow(v, scale).double() * scale for v in each]
        for each, scale in ((batch.keys, k_scale), (batch.values, v_scale))
    ]
    return replace(batch, cache=(sides[0], sides[1]), keys=kept[0], values=kept[1])
