"""Who can attend for several queries a row on a device, and what each can do."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from aserve.attention.base import AttentionMetadata, KVCache
from aserve.attention.rows import Options, Rows, rescaled, scaled
from aserve.ops import cuda, native, reference

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layer:
    """What a model's layer asks of attention, as far as it decides who can serve it."""

    dtype: torch.dtype
    cache_dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    window: bool = False
    softcap: bool = False
    alibi: bool = False


class Backend(ABC):
    """Causal attention of rows with any number of queries over their part of the paged cache."""

    name: ClassVar[str]

    @abstractmethod
    def refusal(self, layer: Layer, device: torch.device) -> str | None:
        """Why it cannot serve such a layer, as far as that is known without trying; None if it may."""

    @abstractmethod
    def attend(self, q: torch.Tensor, cache: KVCache, rows: Rows, options: Options) -> torch.Tensor:
        """q ``[T, Hq, D]``, of all rows; returns ``[T, Hq, D]``."""


class Own(Backend):
    """The paged kernel of the CUDA library, which reads the cache where it lies."""

    name = "own"

    def refusal(self, layer: Layer, device: torch.device) -> str | None:
        if layer.head_size % 8 != 0 or layer.head_size > 256:
            return f"its kernels take head sizes that are multiples of 8 up to 256, not {layer.head_size}"
        if layer.block_size & (layer.block_size - 1):
            return f"its kernels take block sizes that are powers of two, not {layer.block_size}"
        if native.library() is None:
            return "the native library, which defines the operations, is not loaded"
        if not cuda.serves("paged_attention", layer.dtype, layer.cache_dtype, device.index or 0):
            names = [str(each).removeprefix("torch.") for each in (layer.dtype, layer.cache_dtype)]
            return (
                f"its kernels are missing, off or not verified for {names[0]} with a cache of {names[1]} on "
                f"this GPU ({cuda.VARIABLE}=all uses those that are not verified)"
            )
        return None

    def attend(self, q: torch.Tensor, cache: KVCache, rows: Rows, options: Options) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        native.library().paged_attention(
            q,
            *cache,
            rows.query_start,
            rows.seq_lens,
            rows.block_tables,
            options.scale,
            options.window or 0,
            options.softcap or 0.0,
            options.alibi_slopes,
            options.k_scale,
            options.v_scale,
            rows.max_query_len,
            out,
        )
        return out


class Varlen(Backend):
    """torch's own flash attention over packed sequences (``torch.nn.attention.varlen``).

    It cannot read blocks as small as ours, so the rows' keys and values are gathered first.
    """

    name = "varlen"

    def refusal(self, layer: Layer, device: torch.device) -> str | None:
        try:
            parameters = self._parameters()
        except (ImportError, AttributeError) as error:
            return f"this torch has no torch.nn.attention.varlen.varlen_attn ({error})"
        if layer.dtype not in _HALVES:
            return f"it takes bfloat16 and float16, not {str(layer.dtype).removeprefix('torch.')}"
        if layer.head_size % 8 != 0 or layer.head_size > 256:
            return f"it takes head sizes that are multiples of 8 up to 256, not {layer.head_size}"
        missing = {"scale", "window_size"} - parameters
        if missing:
            return f"this torch's varlen_attn has no {' and no '.join(sorted(missing))}"
        return _declined(layer)

    def attend(self, q: torch.Tensor, cache: KVCache, rows: Rows, options: Options) -> torch.Tensor:
        keys, values = rows.keys_and_values(cache, q.dtype)
        more: dict[str, Any] = {}
        if keys.shape[1] != q.shape[1] and "enable_gqa" in self._parameters():
            more["enable_gqa"] = True  # older versions take fewer heads of keys unasked
        out: torch.Tensor = self._function()(
            q,
            keys,
            values,
            rows.query_start,
            rows.key_start(cache[0].shape[2]),
            rows.max_query_len,
            rows.max_seq_len,
            scale=scaled(options, cache),
            # To its left a query sees so many keys besides its own; -1 is all, and 0 to its right none.
            window_size=(-1 if options.window is None else options.window - 1, 0),
            **more,
        )
        return rescaled(out, options, cache)

    @staticmethod
    def _function() -> Any:
        return importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def _parameters(self) -> set[str]:
        return set(inspect.signature(self._function()).parameters)


class Xformers(Backend):
    """xformers' ``memory_efficient_attention`` with a block-diagonal mask over gathered keys and values."""

    name = "xformers"

    def refusal(self, layer: Layer, device: torch.device) -> str | None:
        try:
            self._fmha()
        except ImportError as error:
            return f"xformers cannot be imported ({error}); pip install 'aserve[cuda]' installs it"
        return _declined(layer)

    def attend(self, q: torch.Tensor, cache: KVCache, rows: Rows, options: Options) -> torch.Tensor:
        fmha = self._fmha()
        keys, values = rows.keys_and_values(cache, q.dtype)
        mask = rows.kept.get(options.window)
        if mask is None:
            blocks = fmha.attn_bias.BlockDiagonalMask.from_seqlens(
                rows.query_lens, rows.lengths, device=q.device
            )
            # A row's last query sees its last key, whatever was cached before.
            if options.window is None:
                mask = blocks.make_causal_from_bottomright()
            else:
                mask = blocks.make_local_attention_from_bottomright(options.window)
            rows.kept[options.window] = mask
        tokens, num_heads, size = q.shape
        num_kv_heads = keys.shape[1]
        if num_kv_heads != num_heads:
            # [1, tokens, groups, heads of a group, size]; a group's heads share its keys without a copy.
            group = num_heads // num_kv_heads
            q = q.reshape(tokens, num_kv_heads, group, size)
            keys, values = (x.unsqueeze(2).expand(-1, -1, group, -1) for x in (keys, values))
        out: torch.Tensor = fmha.memory_efficient_attention_forward(
            q.unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_bias=mask,
            scale=scaled(options, cache),
        )
        return rescaled(out.reshape(tokens, num_heads, size), options, cache)

    @staticmethod
    def _fmha() -> Any:
        return importlib.import_module("xformers.ops.fmha")


class Sdpa(Backend):
    """The reference: torch's scaled_dot_product_attention, row by row. It serves everything."""

    name = "sdpa"

    def refusal(self, layer: Layer, device: torch.device) -> str | None:
        return None

    def attend(self, q: torch.Tensor, cache: KVCache, rows: Rows, options: Options) -> torch.Tensor:
        starts = [0]
        for count in rows.query_lens:
            starts.append(starts[-1] + count)
        meta = AttentionMetadata(
            query_start=rows.query_start,
            seq_lens=rows.seq_lens,
            block_tables=rows.block_tables,
            slot_mapping=rows.seq_lens,  # nothing is stored
            max_query_len=rows.max_query_len,
            max_seq_len=rows.max_seq_len,
            num_decode_rows=0,
            query_start_host=starts,
            seq_lens_host=rows.lengths,
        )
        return reference.paged_attention(
            q,
            cache,
            meta,
            options.scale,
            window=options.window,
            softcap=options.softcap,
            alibi_slopes=options.alibi_slopes,
            k_scale=options.k_scale,
            v_scale=options.v_scale,
        )


BACKENDS: dict[str, Backend] = {each.name: each for each in (Own(), Varlen(), Xformers(), Sdpa())}
"""In the order in which they are tried."""


def _declined(layer: Layer) -> str | None:
    """What the packed backends cannot do."""
    if layer.softcap:
        return "it cannot cap scores (softcap)"
    if layer.alibi:
        return "it has no ALiBi slopes for packed sequences"
    return None
