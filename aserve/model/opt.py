"""OPT (Zhang et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from aserve.attention.base import AttentionMetadata, KVCache
from aserve.errors import ConfigError
from aserve.model.base import Model
from aserve.model.layers.attention import PagedAttention
from aserve.model.layers.embedding import DenseEmbedding, OutputHead, make_embedding
from aserve.model.layers.linear import Build
from aserve.model.layers.norm import LayerNorm

if TYPE_CHECKING:
    from aserve.config.model import ModelConfig

_POSITION_OFFSET = 2  # rows 0 and 1 of the position table belong to padding
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu_,
    "gelu": F.gelu,
    "silu": lambda x: F.silu(x, inplace=True),
}


class OPTForCausalLM(Model):
    """Decoder with learned positions and layer norms, before or (opt-350m) after each block.

    ``word_embed_proj_dim`` other than the hidden size puts a projection on either side of the layers.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, device, dtype)
        hf = config.hf_config
        width, hidden = hf.word_embed_proj_dim, hf.hidden_size
        if config.max_model_len > hf.max_position_embeddings:
            raise ConfigError(
                f"max_model_len {config.max_model_len} is more than the {hf.max_position_embeddings} "
                "learned positions of this model"
            )
        prefix = "model.decoder"
        self.tied = bool(hf.tie_word_embeddings)
        self.embedding = make_embedding(
            self.build, f"{prefix}.embed_tokens", hf.vocab_size, width, is_head=self.tied
        )
        self.positions = DenseEmbedding(
            self.build,
            f"{prefix}.embed_positions",
            hf.max_position_embeddings + _POSITION_OFFSET,
            hidden,
            is_head=False,
        )
        self.project_in = self.project_out = None
        if width != hidden:
            self.project_in = self.build.linear({f"{prefix}.project_in": hidden}, width)
            self.project_out = self.build.linear({f"{prefix}.project_out": width}, hidden)
        self.layers = [
            DecoderLayer(self.build, hf, f"{prefix}.layers.{index}") for index in range(hf.num_hidden_layers)
        ]
        self.final_norm = None
        if hf.do_layer_norm_before and not hf._remove_final_layer_norm:
            self.final_norm = _layer_norm(self.build, f"{prefix}.final_layer_norm", hf)
        self.head = OutputHead(self.build, "lm_head", self.embedding, self.tied)
        head_size = hidden // hf.num_attention_heads
        self.kv_shapes = [(hf.num_attention_heads, head_size)] * hf.num_hidden_layers

    def rename(self, name: str) -> str | None:
        if name.startswith("decoder."):  # saved from the model without its head
            name = f"model.{name}"
        return super().rename(name)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        caches: list[KVCache],
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        hidden = self.embedding.lookup(token_ids)
        if self.project_in is not None:
            hidden = self.project_in.apply(hidden)
        hidden = hidden + self.positions.lookup(positions + _POSITION_OFFSET)
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer.forward(hidden, positions, cache, meta)
        if self.final_norm is not None:
            hidden = self.final_norm.apply(hidden)
        if self.project_out is not None:
            hidden = self.project_out.apply(hidden)
        return hidden


def _layer_norm(build: Build, name: str, hf: Any) -> LayerNorm:
    return LayerNorm(build, name, hf.hidden_size, affine=hf.layer_norm_elementwise_affine)


class DecoderLayer:
    def __init__(self, build: Build, hf: Any, prefix: str) -> None:
        hidden, heads = hf.hidden_size, hf.num_attention_heads
        activation = _ACTIVATIONS.get(hf.activation_function)
        if activation is None:
            raise ConfigError(
                f"activation {hf.activation_function!r} is not supported in OPT; "
                f"known: {', '.join(sorted(_ACTIVATIONS))}"
            )
        self.activation = activation
        self.norm_first = hf.do_layer_norm_before
        self.attention_norm = _layer_norm(build, f"{prefix}.self_attn_layer_norm", hf)
        self.qkv = build.linear(
            {f"{prefix}.self_attn.{part}_proj": hidden for part in ("q", "k", "v")},
            hidden,
            bias=hf.enable_bias,
        )
        head_size = hidden // heads
        self.attention = PagedAttention(
            num_heads=heads, num_kv_heads=heads, head_size=head_size, scale=head_size**-0.5
        )
        self.out = build.linear({f"{prefix}.self_attn.out_proj": hidden}, hidden, bias=hf.enable_bias)
        self.final_norm = _layer_norm(build, f"{prefix}.final_layer_norm", hf)
        self.fc1 = build.linear({f"{prefix}.fc1": hf.ffn_dim}, hidden, bias=hf.enable_bias)
        self.fc2 = build.linear({f"{prefix}.fc2": hidden}, hf.ffn_dim, bias=hf.enable_bias)

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        """hidden: ``[T, H]``."""
        normed = self.attention_norm.apply(hidden) if self.norm_first else hidden
        q, k, v = self.attention.split(self.qkv.apply(normed))
        attended = self.attention.apply(q, k, v, positions, cache, meta)
        hidden = self.out.apply(attended).add_(hidden)
        if not self.norm_first:
            hidden = self.attention_norm.apply(hidden)
        normed = self.final_norm.apply(hidden) if self.norm_first else hidden
        hidden = self.fc2.apply(self.activation(self.fc1.apply(normed))).add_(hidden)
        return hidden if self.norm_first else self.final_norm.apply(hidden)
