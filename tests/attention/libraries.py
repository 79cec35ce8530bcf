"""Stand-ins for torch's varlen attention and for xformers: the calls as their documentation has them, their
conditions checked, their results worked out in float64.

torch: torch.nn.attention.varlen of 2.13 (docs.pytorch.org/docs/2.12/nn.attention.varlen.html), and of 2.11
without what came later. xformers 0.0.35: xformers.ops.fmha and its attn_bias.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

HALVES = (torch.bfloat16, torch.float16)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """q ``[T, Hq, D]``, k and v ``[K, Hkv, D]``, visible ``[T, K]``."""
    group = q.shape[1] // k.shape[1]
    wide = (x.double().repeat_interleave(group, 1) for x in (k, v))
    keys, values = wide
    scores = torch.einsum("thd,khd->htk", q.double(), keys) * scale
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("htk,khd->thd", weights, values).to(q.dtype)


@dataclass
class Varlen:
    """``torch.nn.attention.varlen``, as it is or with a fault."""

    fault: str = ""
    calls: int = 0

    def compute(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor | None,
        max_q: int,
        max_k: int,
        scale: float | None,
        window_size: tuple[int, int],
    ) -> torch.Tensor:
        self.calls += 1
        assert cu_seq_k is not None
        for x in (query, key, value):
            assert x.dim() == 3
            assert x.stride(-1) == 1
            assert x.dtype == query.dtype
        assert query.dtype in HALVES
        assert key.shape == value.shape
        assert key.shape[2] == query.shape[2]
        assert query.shape[2] % 8 == 0
        for starts in (cu_seq_q, cu_seq_k):
            assert starts.dtype == torch.int32
            assert starts.is_contiguous()
        assert isinstance(window_size, tuple)
        if isinstance(query, torch._subclasses.FakeTensor):
            return torch.empty_like(query)
        ends_q, ends_k = cu_seq_q.tolist(), cu_seq_k.tolist()
        assert (ends_q[-1], ends_k[-1]) == (len(query), len(key))
        lengths = [[b - a for a, b in pairwise(ends)] for ends in (ends_q, ends_k)]
        assert (max_q, max_k) == (max(lengths[0]), max(lengths[1]))
        if self.fault == "raises":
            raise RuntimeError("no kernel image is available. Compile with more of them\nand so on")
        out = torch.full_like(query, math.nan) if self.fault == "nan" else torch.zeros_like(query)
        if self.fault == "nan":
            return out
        left, right = window_size
        for row in range(len(ends_q) - 1):
            of_q, of_k = slice(*ends_q[row : row + 2]), slice(*ends_k[row : row + 2])
            count, length = lengths[0][row], lengths[1][row]
            shift = 0 if self.fault == "top left" else length - count
            distance = (torch.arange(count) + shift)[:, None] - torch.arange(length)
            visible = torch.ones_like(distance, dtype=torch.bool)
            if right >= 0:
                visible &= distance >= -right
            if left >= 0:
                visible &= distance <= left
            out[of_q] = attention(
                query[of_q], key[of_k], value[of_k], visible, scale or query.shape[-1] ** -0.5
            )
        return out

    def module(self, newest: bool = True) -> ModuleType:
        made: Any = ModuleType("torch.nn.attention.varlen")

        def varlen_attn(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            cu_seq_q: torch.Tensor,
            cu_seq_k: torch.Tensor | None,
            max_q: int,
            max_k: int,
            *,
            return_aux: Any = None,
            scale: float | None = None,
            window_size: tuple[int, int] = (-1, -1),
            enable_gqa: bool = False,
            seqused_k: torch.Tensor | None = None,
            block_table: torch.Tensor | None = None,
            num_splits: int | None = None,
        ) -> torch.Tensor:
            assert enable_gqa or query.shape[1] == key.shape[1], "GQA without being told"
            return self.compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

        def older(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            cu_seq_q: torch.Tensor,
            cu_seq_k: torch.Tensor,
            max_q: int,
            max_k: int,
            *,
            return_aux: Any = None,
            scale: float | None = None,
            window_size: tuple[int, int] = (-1, -1),
        ) -> torch.Tensor:
            return self.compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

        made.varlen_attn = varlen_attn if newest else older
        return made


@dataclass
class BlockDiagonalMask:
    q_seqlen: list[int]
    kv_seqlen: list[int]
    device: torch.device | None
    bottom_right: bool = False
    window: int | None = None

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: list[int],
        kv_seqlen: list[int] | None = None,
        *,
        device: torch.device | None = None,
    ) -> BlockDiagonalMask:
        assert kv_seqlen is not None
        assert len(q_seqlen) == len(kv_seqlen)
        return cls(q_seqlen, kv_seqlen, device)

    def make_causal_from_bottomright(self) -> BlockDiagonalMask:
        assert all(k >= q for q, k in zip(self.q_seqlen, self.kv_seqlen, strict=True))
        return BlockDiagonalMask(self.q_seqlen, self.kv_seqlen, self.device, True)

    def make_local_attention_from_bottomright(self, window_size: int) -> BlockDiagonalMask:
        assert window_size > 0
        return BlockDiagonalMask(self.q_seqlen, self.kv_seqlen, self.device, True, window_size)

    def materialise(self) -> torch.Tensor:
        visible = torch.zeros(sum(self.q_seqlen), sum(self.kv_seqlen), dtype=torch.bool)
        at_q = at_k = 0
        for q, k in zip(self.q_seqlen, self.kv_seqlen, strict=True):
            block = torch.ones(q, k).tril(k - q)
            if self.window is not None:
                block = block.triu(k - q - self.window + 1)
            visible[at_q : at_q + q, at_k : at_k + k] = block.bool()
            at_q, at_k = at_q + q, at_k + k
        return visible


@dataclass
class Xformers:
    """``xformers.ops.fmha``."""

    calls: int = 0

    def memory_efficient_attention_forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: Any = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        self.calls += 1
        assert isinstance(attn_bias, BlockDiagonalMask)
        assert attn_bias.bottom_right
        for x in (query, key, value):
            assert x.dim() == query.dim()
            assert x.dtype == query.dtype
            assert x.device == query.device == attn_bias.device
            assert x.stride(-1) == 1
            assert len(x) == 1, "a block-diagonal mask takes a batch of one"
        assert key.shape == value.shape
        assert query.shape[2:] == key.shape[2:], "as many heads, and groups of them"
        if query.dim() == 5:
            assert key.stride(3) == 0, "the heads of a group share their keys without a copy"
        flat = [x[0].flatten(1, -2) for x in (query, key, value)]
        assert scale is not None
        out = attention(*flat, attn_bias.materialise(), scale)
        return out.view(query.shape)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Xformers:
        fmha: Any = ModuleType("xformers.ops.fmha")
        fmha.memory_efficient_attention_forward = self.memory_efficient_attention_forward
        fmha.attn_bias = ModuleType("xformers.ops.fmha.attn_bias")
        fmha.attn_bias.BlockDiagonalMask = BlockDiagonalMask
        for name, module in (
            ("xformers", ModuleType("xformers")),
            ("xformers.ops", ModuleType("xformers.ops")),
            ("xformers.ops.fmha", fmha),
        ):
            monkeypatch.setitem(sys.modules, name, module)
        return self
