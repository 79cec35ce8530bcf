"""A decoder layer's parts as the native decoder takes them."""

from __future__ import annotations

from typing import Protocol

import torch

from aserve.errors import ConfigError
from aserve.model.layers.attention import PagedAttention
from aserve.model.layers.linear import Linear, packed_weights
from aserve.model.layers.norm import RMSNorm
from aserve.ops.decoder import LayerSpec


class GatedLayer(Protocol):
    """A layer with grouped-query attention and a gated feed-forward part, its weights packed."""

    @property
    def input_norm(self) -> RMSNorm: ...

    @property
    def qkv(self) -> Linear: ...

    @property
    def q_norm(self) -> RMSNorm | None: ...

    @property
    def k_norm(self) -> RMSNorm | None: ...

    @property
    def attention(self) -> PagedAttention: ...

    @property
    def out(self) -> Linear: ...

    @property
    def gate_up(self) -> Linear: ...

    @property
    def activation_kind(self) -> str: ...

    @property
    def down(self) -> Linear: ...


def layer_spec(
    layer: GatedLayer,
    *,
    pre_mlp_norm: RMSNorm,
    post_attention_norm: RMSNorm | None = None,
    post_mlp_norm: RMSNorm | None = None,
) -> LayerSpec:
    """The layer for :class:`aserve.ops.decoder.DecoderStack`; the norms are those only some models have."""

    def wide(norm: RMSNorm | None) -> torch.Tensor | None:
        return None if norm is None else norm.weight.float()

    attention = layer.attention
    if attention.rotary is None:
        raise ConfigError("the native decoder rotates queries and keys; this layer has no rotary table")
    q, k, v = packed_weights(layer.qkv)
    (out,) = packed_weights(layer.out)
    gate, up = packed_weights(layer.gate_up)
    (down,) = packed_weights(layer.down)
    return LayerSpec(
        input_norm=layer.input_norm.weight.float(),
        q=q,
        k=k,
        v=v,
        out=out,
        gate=gate,
        up=up,
        down=down,
        q_norm=wide(layer.q_norm),
        k_norm=wide(layer.k_norm),
        post_attention_norm=wide(post_attention_norm),
        pre_mlp_norm=pre_mlp_norm.weight.float(),
        post_mlp_norm=wide(post_mlp_norm),
        cos_sin=attention.rotary.cos_sin,
        interleaved=False,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_size=attention.head_size,
        scale=attention.scale,
        window=attention.window,
        softcap=attention.softcap,
        activation=layer.activation_kind,
        eps=layer.input_norm.eps,
    )
