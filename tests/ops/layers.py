"""Random decoder layers, and a step through them written out in torch in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from aserve.attention.base import AttentionMetadata, KVCache
from aserve.gpu_check.paging import metadata
from aserve.ops import packed
from aserve.ops.decoder import LayerSpec

Rows = tuple[tuple[int, int], ...]
"""Of each row: tokens of this step, length of the sequence after it."""

DENSE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
QUANTISED = {"q4_0": 2, "q4_1": 3, "q8_0": 8, "q4_k": 12, "q6_k": 14}
WEIGHTS = ("q", "k", "v", "out", "gate", "up", "down")
MAX_POSITION = 600


@dataclass(frozen=True)
class Shape:
    """formats: of q, k, v, out, gate, up, down."""

    formats: tuple[str, ...] = ("f32",) * 7
    hidden: int = 96
    mlp: int = 160
    heads: int = 6
    kv_heads: int = 2
    head_size: int = 32
    rotary: int = 32
    layers: int = 2
    bias: bool = False
    head_norms: bool = False
    sandwich: bool = False
    windows: tuple[int | None, ...] = (None,)
    softcap: float | None = None
    interleaved: bool = False
    activation: str = "silu"
    cache: torch.dtype = torch.float32


def layers(shape: Shape, seed: int = 0) -> tuple[list[LayerSpec], torch.Tensor]:
    """The layers and the final norm."""
    random = torch.Generator().manual_seed(seed)
    wide, narrow = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    attention = ((wide, shape.hidden), (narrow, shape.hidden), (narrow, shape.hidden), (shape.hidden, wide))
    sizes = (*attention, (shape.mlp, shape.hidden), (shape.mlp, shape.hidden), (shape.hidden, shape.mlp))

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.3 * torch.randn(size, generator=random)

    made = []
    for index in range(shape.layers):
        weights = {
            name: _weight(format, size, random, shape.bias and name in "qkv")
            for name, format, size in zip(WEIGHTS, shape.formats, sizes, strict=True)
        }
        angles = torch.rand(MAX_POSITION, shape.rotary // 2, generator=random) * 6
        made.append(
            LayerSpec(
                **weights,
                input_norm=norm(shape.hidden),
                pre_mlp_norm=norm(shape.hidden),
                post_attention_norm=norm(shape.hidden) if shape.sandwich else None,
                post_mlp_norm=norm(shape.hidden) if shape.sandwich else None,
                q_norm=norm(shape.head_size) if shape.head_norms else None,
                k_norm=norm(shape.head_size) if shape.head_norms else None,
                cos_sin=torch.cat((angles.cos(), angles.sin()), dim=1),
                num_heads=shape.heads,
                num_kv_heads=shape.kv_heads,
                head_size=shape.head_size,
                scale=1.3 / math.sqrt(shape.head_size),
                eps=1e-5,
                interleaved=shape.interleaved,
                window=shape.windows[index % len(shape.windows)],
                softcap=shape.softcap,
                activation=shape.activation,
            )
        )
    return made, norm(shape.hidden)


def _weight(format: str, size: tuple[int, int], random: torch.Generator, bias: bool) -> packed.PackedWeight:
    weight = torch.randn(size, generator=random) / math.sqrt(size[1])
    offset = torch.randn(size[0], generator=random) if bias else None
    if format in DENSE:
        return packed.pack(weight.to(DENSE[format]), offset)
    return packed.pack_gguf(quantised(weight, format), QUANTISED[format], size, bias=offset)


def quantised(weight: torch.Tensor, format: str) -> torch.Tensor:
    """The bytes of a GGUF tensor: quantised where the gguf package can, else random codes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    kind = GGMLQuantizationType(QUANTISED[format])
    if not format.endswith("_k"):
        return torch.from_numpy(quantize(weight.numpy(), kind).reshape(-1).view(np.uint8).copy())
    block, size = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(weight.numel()).integers(
        0, 256, (weight.numel() // block, size), dtype=np.uint8
    )
    # The block's own scales, float16, lie first, or last in q6_k.
    scales = blocks[:, -2:] if format == "q6_k" else blocks[:, :4]
    scales.view(np.float16)[:] = 1e-4 if format == "q6_k" else 1e-3
    return torch.from_numpy(blocks.reshape(-1))


@dataclass
class Step:
    hidden: torch.Tensor
    positions: torch.Tensor
    caches: list[KVCache]
    meta: AttentionMetadata
    rows: Rows

    def fresh(self) -> Step:
        """The same before it has run."""
        return replace(self, caches=[(k.clone(), v.clone()) for k, v in self.caches])

    def part(self, row: int, first: int, last: int) -> Step:
        """Tokens ``first : last`` of a row as a step of its own, on the same caches."""
        tokens, length = self.rows[row]
        start = self.meta.query_start_host[row]
        at = slice(start + first, start + last)
        rows = ((last - first, length - tokens + last),)
        meta = metadata(rows, self.meta.block_tables[row : row + 1])
        meta.slot_mapping = self.meta.slot_mapping[at]
        return Step(self.hidden[at], self.positions[at], self.caches, meta, rows)


def step(shape: Shape, rows: Rows, seed: int = 0, block_size: int = 16) -> Step:
    """Random tokens after random cached ones. The caches are NaN where nothing has been stored."""
    random = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for _, length in rows]
    total = sum(counts) + 2
    order = torch.randperm(total, generator=random).int()
    tables = torch.zeros(len(rows), max(counts) + 1, dtype=torch.int32)
    size = (total, shape.kv_heads, block_size, shape.head_size)
    caches = [
        (torch.full(size, math.nan, dtype=shape.cache), torch.full(size, math.nan, dtype=shape.cache))
        for _ in range(shape.layers)
    ]
    positions, slots, at = [], [], 0
    for row, (tokens, length) in enumerate(rows):
        tables[row, : counts[row]] = order[at : at + counts[row]]
        at += counts[row]
        before, new = torch.arange(length - tokens), torch.arange(length - tokens, length)
        blocks = tables[row].long()
        for cache in caches:
            for side in cache:
                known = torch.randn(len(before), shape.kv_heads, shape.head_size, generator=random)
                side[blocks[before // block_size], :, before % block_size] = known.to(shape.cache)
        positions.append(new)
        slots.append(blocks[new // block_size] * block_size + new % block_size)
    meta = metadata(rows, tables)
    meta.slot_mapping = torch.cat(slots)
    hidden = torch.randn(len(meta.slot_mapping), shape.hidden, generator=random)
    return Step(hidden, torch.cat(positions), caches, meta, rows)


def exact(specs: list[LayerSpec], final_norm: torch.Tensor, given: Step) -> torch.Tensor:
    """What the layers make of the step in float64; writes into its caches.

    A product with a quantised weight is the native one, whose activations are rounded to int8.
    """
    x = given.hidden.double()
    for spec, cache in zip(specs, given.caches, strict=True):
        attended = _attention(spec, cache, given, _norm(x, spec.input_norm, spec.eps))
        x = x + _norm(attended, spec.post_attention_norm, spec.eps)
        normed = _norm(x, spec.pre_mlp_norm, spec.eps)
        gate, up = _linear(normed, spec.gate), _linear(normed, spec.up)
        if spec.activation == "silu":
            gate = F.silu(gate)
        else:
            gate = F.gelu(gate, approximate="tanh" if spec.activation == "gelu_tanh" else "none")
        x = x + _norm(_linear(gate * up, spec.down), spec.post_mlp_norm, spec.eps)
    return _norm(x, final_norm, 1e-6)


def _norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x if weight is None else F.rms_norm(x, x.shape[-1:], weight.double(), eps)


def _linear(x: torch.Tensor, weight: packed.PackedWeight) -> torch.Tensor:
    if weight.format not in DENSE:
        return packed.linear_float(x.float(), weight).double()
    matrix = packed.rows(weight, torch.arange(weight.rows)).double()
    return F.linear(x, matrix, None if weight.bias is None else weight.bias.double())


def _rotated(spec: LayerSpec, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    cos, sin = spec.cos_sin[positions].double().unsqueeze(1).chunk(2, -1)
    turned = x.clone()
    width = spec.cos_sin.shape[1]
    if spec.interleaved:
        first, second = slice(0, width, 2), slice(1, width, 2)
    else:
        first, second = slice(0, width // 2), slice(width // 2, width)
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., second] * cos + x[..., first] * sin
    return turned


def _attention(spec: LayerSpec, cache: KVCache, given: Step, x: torch.Tensor) -> torch.Tensor:
    tokens, size = len(x), spec.head_size
    q = _norm(_linear(x, spec.q).view(tokens, spec.num_heads, size), spec.q_norm, spec.eps)
    k = _norm(_linear(x, spec.k).view(tokens, spec.num_kv_heads, size), spec.k_norm, spec.eps)
    v = _linear(x, spec.v).view(tokens, spec.num_kv_heads, size)
    q, k = _rotated(spec, q, given.positions), _rotated(spec, k, given.positions)
    block_size = cache[0].shape[2]
    blocks, offsets = given.meta.slot_mapping // block_size, given.meta.slot_mapping % block_size
    for side, new in zip(cache, (k, v), strict=True):
        side[blocks, :, offsets] = new.float().to(side.dtype)
    out = torch.empty_like(q)
    for row, (count, length) in enumerate(given.rows):
        at = slice(given.meta.query_start_host[row], given.meta.query_start_host[row] + count)
        where = torch.arange(length)
        table = given.meta.block_tables[row].long()[where // block_size]
        keys, values = (side[table, :, where % block_size].double() for side in cache)
        distance = torch.arange(length - count, length).unsqueeze(1) - where
        hidden = distance < 0
        if spec.window is not None:
            hidden |= distance >= spec.window
        heads = torch.arange(spec.num_heads) // (spec.num_heads // spec.num_kv_heads)
        scores = torch.einsum("qhd,lhd->hql", q[at], keys[:, heads]) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out[at] = torch.einsum("hql,lhd->qhd", weights, values[:, heads])
    return _linear(out.flatten(1), spec.out)
