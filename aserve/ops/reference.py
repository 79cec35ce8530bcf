"""Every operation in plain torch: the oracle of the kernels, and the fallback where there is none."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from aserve.attention.base import AttentionMetadata, KVCache
from aserve.attention.decode import decode
from aserve.attention.dense import NARROW, attend, narrow, quantised


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019), computed in float32.

    x: ``[..., H]``; weight: ``[H]``. A Gemma-style ``1 + w`` is folded into ``weight`` by the caller.
    """
    x32 = x.float()
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (x32 * scale * weight.float()).to(x.dtype)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(rms_norm(x + residual), x + residual)``."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotary_embedding(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding (Su et al. 2021) on the first ``R`` features of each head.

    q: ``[T, Hq, D]``; k: ``[T, Hkv, D]``; positions: int64 ``[T]``; cos_sin: float32
    ``[max_position, R]``, the ``R/2`` cosines of a position followed by its ``R/2`` sines.
    ``interleaved`` rotates neighbouring pairs (GPT-J) instead of halves (GPT-NeoX, Llama).
    Returns new tensors of the same shapes and dtypes.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    width = 2 * cos.shape[-1]
    part, rest = x[..., :width].float(), x[..., width:]
    if interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = part.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    turned = turned.to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


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
    """:func:`rotary_embedding`, with the turned keys and the values going to :func:`store_kv`.

    Returns the turned queries.
    """
    q, k = rotary_embedding(q, k, positions, cos_sin, interleaved)
    store_kv(k, v, cache, slot_mapping, k_scale, v_scale)
    return q


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Writes this step's keys and values ``[T, Hkv, D]`` into the paged cache.

    k_scale, v_scale: an 8-bit cache holds the values divided by them, as near as it can; they are 1 for
    every other.
    """
    block_size = cache[0].shape[2]
    blocks = slot_mapping // block_size
    offsets = slot_mapping % block_size
    for side, x, factor in zip(cache, (k, v), (k_scale, v_scale), strict=True):
        if side.dtype in NARROW:
            # As bytes: not every torch indexes 8-bit floats.
            written = quantised(x, side.dtype, factor)
            side.view(torch.uint8)[blocks, :, offsets] = written.view(torch.uint8)
        else:
            side[blocks, :, offsets] = x.to(side.dtype)


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
    """Causal attention of this step's queries over their sequences' cached keys and values.

    q: ``[T, Hq, D]``; returns ``[T, Hq, D]``. Query head ``h`` reads KV head ``h // (Hq / Hkv)``.
    window: a query at position ``p`` sees keys ``p - window + 1 .. p``.
    softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
    alibi_slopes: float32 ``[Hq]``, adds ``-slope * distance`` (Press et al. 2022).
    k_scale, v_scale: as :func:`store_kv` was given them.
    """
    if meta.graph:
        return decode(
            q,
            cache,
            meta.block_tables,
            meta.seq_lens,
            scale,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    is_narrow = narrow(cache)
    if is_narrow:
        scale = scale * k_scale
    out = torch.empty_like(q)
    num_rows = len(meta.seq_lens_host)
    first_decode = num_rows - meta.num_decode_rows
    for row in range(first_decode):
        start, end = meta.query_start_host[row], meta.query_start_host[row + 1]
        length = meta.seq_lens_host[row]
        keys, values = _gather(cache, meta.block_tables[row : row + 1], length, q.dtype)
        q_pos = torch.arange(length - (end - start), length, device=q.device).unsqueeze(0)
        out[start:end] = attend(
            q[start:end].unsqueeze(0), keys, values, q_pos, scale, window, softcap, alibi_slopes
        )[0]
    if meta.num_decode_rows:
        start = meta.query_start_host[first_decode]
        lengths = meta.seq_lens[first_decode:].long()
        longest = max(meta.seq_lens_host[first_decode:])
        keys, values = _gather(cache, meta.block_tables[first_decode:], longest, q.dtype)
        if min(meta.seq_lens_host[first_decode:]) < longest:
            # What lies past a row's end is unknown, perhaps NaN, which a weight of zero would not silence.
            past = torch.arange(longest, device=q.device) >= lengths.unsqueeze(1)
            keys.masked_fill_(past[:, None, :, None], 0)
            values.masked_fill_(past[:, None, :, None], 0)
        out[start:] = attend(
            q[start:].unsqueeze(1),
            keys,
            values,
            (lengths - 1).unsqueeze(1),
            scale,
            window,
            softcap,
            alibi_slopes,
        )[:, 0]
    return out * v_scale if is_narrow and v_scale != 1.0 else out


def _gather(
    cache: KVCache, tables: torch.Tensor, length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of each table's first ``length`` tokens, each ``[B, Hkv, length, D]``."""
    block_size = cache[0].shape[2]
    blocks = tables[:, : -(-length // block_size)].long()
    gathered = []
    for side in cache:
        pages = side.view(torch.uint8)[blocks].view(side.dtype).to(dtype) if narrow(cache) else side[blocks]
        flat = pages.permute(0, 2, 1, 3, 4).flatten(2, 3)
        gathered.append(flat[:, :, :length])
    return gathered[0], gathered[1]


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[..., :d]) * x[..., d:]`` with ``d`` half the last dimension (SwiGLU)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_and_mul(x: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    """``gelu(x[..., :d]) * x[..., d:]`` (GeGLU); ``approximate`` is ``"tanh"`` or ``"none"``."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up


def copy_blocks(caches: list[KVCache], pairs: list[tuple[int, int]]) -> None:
    """Copies whole blocks, ``(source, destination)`` ids, in the order given, in every layer."""
    written: set[int] = set()
    first = 0
    for at, (source, destination) in enumerate(pairs):
        # One indexed copy reads all its sources first, so a block written before starts another.
        if source in written or destination in written:
            _copy_at_once(caches, pairs[first:at])
            written.clear()
            first = at
        written.add(destination)
    _copy_at_once(caches, pairs[first:])


def swap_blocks(source: list[KVCache], target: list[KVCache], pairs: list[tuple[int, int]]) -> None:
    """Copies whole blocks, ``(source, target)`` ids, from one cache to another, in every layer.

    The caches have one layer count, dtype and block shape, but may differ in number of blocks and device.
    No target may come twice.
    """
    if not pairs:
        return
    for from_sides, to_sides in zip(source, target, strict=True):
        for side, other in zip(from_sides, to_sides, strict=True):
            index = torch.tensor(pairs, dtype=torch.long)
            taken = _indexable(side)[index[:, 0].to(side.device)]
            _indexable(other)[index[:, 1].to(other.device)] = taken.to(other.device)


def _copy_at_once(caches: list[KVCache], pairs: list[tuple[int, int]]) -> None:
    if not pairs or not caches:
        return
    index = torch.tensor(pairs, dtype=torch.long, device=caches[0][0].device)
    source, destination = index[:, 0], index[:, 1]
    for sides in caches:
        for side in map(_indexable, sides):
            side[destination] = side[source]


def _indexable(side: torch.Tensor) -> torch.Tensor:
    """8-bit floats as bytes: not every torch indexes them."""
    return side.view(torch.uint8) if side.dtype in NARROW else side


def penalties(
    logits: torch.Tensor,
    starts: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> None:
    """Penalises tokens of each row of logits ``[B, V]``, in place.

    Row ``i`` concerns tokens ``ids[starts[i] : starts[i + 1]]``, each named once: starts int64 ``[B + 1]``
    from 0 to ``N``, ids int64 ``[N]``. counts: int32 ``[N]``, how often the row's output holds the token; 0
    where only its prompt does. repetition (Keskar et al. 2019, CTRL) divides positive logits and multiplies
    the others; frequency, times the count, and presence, where there is a count, are subtracted as OpenAI
    defines them: float32 ``[B]`` each, without effect where 1, 0 and 0.
    """
    rows = torch.arange(len(logits), device=logits.device)
    row = rows.repeat_interleave(starts.diff(), output_size=len(ids))
    picked = logits[row, ids].float()
    factor = repetition[row]
    picked = torch.where(picked > 0, picked / factor, picked * factor)
    picked -= frequency[row] * counts
    picked -= presence[row] * (counts > 0)
    logits[row, ids] = picked.to(logits.dtype)


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a token of ``softmax(logits / temperature)`` for each row.

    logits: ``[B, V]``; temperature: float32 ``[B]``, 0 for the likeliest token. The draw is the greatest of
    logit / temperature + Gumbel noise (Gumbel 1954), and the noise SplitMix64 (Steele, Lea & Flood 2014) of
    seeds, positions (int64 ``[B]`` each) and the token's id: no row depends on another, or on its batch.
    Returns int64 ``[B]`` and the tokens' log-probabilities in that softmax, float32 ``[B]``; those are not
    finite where there is no such softmax.
    """
    greedy = temperature == 0
    heated = logits.float() / temperature.masked_fill(greedy, 1.0).unsqueeze(1)
    stream = _scramble(_scramble(seeds) + positions)
    token = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    bits = _shifted(_scramble(stream.unsqueeze(1) + token * _GOLDEN), 41)
    noise = -torch.log(-torch.log((bits.float() + 0.5) * 2.0**-23))
    keys = torch.where(greedy.unsqueeze(1), heated, heated + noise)
    keys = keys.masked_fill(keys.isnan(), float("-inf"))
    token_ids = (keys == keys.amax(-1, keepdim=True)).int().argmax(-1)
    return token_ids, heated.log_softmax(-1).gather(1, token_ids.unsqueeze(1)).squeeze(1)


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def _shifted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """int64 shifted right as if unsigned."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _scramble(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shifted(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _shifted(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ _shifted(z, 31)


def samples(device: torch.device) -> bool:
    """Whether :func:`sample` is one pass of that device's kernel over float32 logits."""
    return False


_BITS = torch.arange(32, dtype=torch.int32)


def greedy_allowed(logits: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely of each row's allowed tokens, and its log-probability among them.

    logits: float32 ``[B, V]``. allowed: int32 ``[B, ceil(V / 32)]``; token ``i`` counts if bit ``i % 32`` of
    word ``i // 32`` is set, and the logits of the others are not looked at. Returns int64 ``[B]`` (the first
    of equal ones) and float32 ``[B]``, not finite for a row that allows nothing.
    """
    bits = allowed.unsqueeze(-1) >> _BITS.to(allowed.device) & 1
    counts = bits.bool().view(len(allowed), -1)[:, : logits.shape[1]]
    return greedy_logprob(logits.masked_fill(~counts, float("-inf")))


def greedy_logprob(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely token of each row and its log-probability.

    logits: ``[B, V]``; returns int64 ``[B]`` (the first of equal ones) and float32 ``[B]``.
    """
    logits = logits.float()
    top = logits.amax(-1, keepdim=True)
    token_ids = (logits == top).int().argmax(-1)
    # log_softmax gives a row the same bits whatever rows are beside it; logsumexp does not.
    return token_ids, logits.log_softmax(-1).gather(1, token_ids.unsqueeze(1)).squeeze(1)
