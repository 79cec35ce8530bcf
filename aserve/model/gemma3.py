"""Gemma 3, text only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from aserve.attention.base import AttentionMetadata, KVCache
from aserve.errors import ConfigError, UnsupportedError
from aserve.model.base import Model, layer_window
from aserve.model.layers.activation import gated_activation, gated_kind
from aserve.model.layers.attention import PagedAttention
from aserve.model.layers.embedding import OutputHead, make_embedding
from aserve.model.layers.linear import Build
from aserve.model.layers.norm import RMSNorm
from aserve.model.layers.rotary import Rotary, make_rotary, rope_parameters
from aserve.model.layers.stack import layer_spec
from aserve.ops.decoder import LayerSpec

if TYPE_CHECKING:
    from aserve.config.model import ModelConfig


class Gemma3ForCausalLM(Model):
    """Sandwich-norm decoder: local layers see a sliding window, every few layers one sees everything.

    The two kinds have rotary tables of their own; ``--rope-scaling`` is for the global one. Embeddings
    are multiplied by ``sqrt(hidden_size)``, rounded to the run dtype as in training where hidden states
    have that dtype.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, device, dtype)
        hf = config.hf_config
        if getattr(hf, "use_bidirectional_attention", False):
            raise UnsupportedError("Gemma 3 models with bidirectional attention do not generate text")
        if hf.num_attention_heads % hf.num_key_value_heads:
            raise ConfigError(
                f"{hf.num_attention_heads} attention heads are not a multiple of "
                f"{hf.num_key_value_heads} KV heads"
            )
        rotaries = {
            kind: make_rotary(
                rope_parameters(hf, config.rope_scaling if kind == "full_attention" else None, kind),
                head_size=hf.head_dim,
                max_position=hf.max_position_embeddings,
                max_model_len=config.max_model_len,
                device=device,
            )
            for kind in sorted(set(hf.layer_types))
        }
        self.tied = bool(hf.tie_word_embeddings)
        self.embedding = make_embedding(
            self.build, "model.embed_tokens", hf.vocab_size, hf.hidden_size, is_head=self.tied
        )
        self.embedding_factor = hf.hidden_size**0.5
        self.embedding_scale = torch.tensor(hf.hidden_size**0.5, dtype=dtype, device=device)
        self.layers = [
            DecoderLayer(self.build, hf, index, rotaries[hf.layer_types[index]])
            for index in range(hf.num_hidden_layers)
        ]
        self.norm = _norm(self.build, "model.norm", hf.hidden_size, hf)
        self.head = OutputHead(
            self.build, "lm_head", self.embedding, self.tied, softcap=hf.final_logit_softcapping
        )
        self.kv_shapes = [(hf.num_key_value_heads, hf.head_dim)] * hf.num_hidden_layers

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        caches: list[KVCache],
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        if self._stack is not None:
            wide = self.embedding.lookup_float(token_ids).mul_(self.embedding_factor)
            return self._stack.forward(wide, positions, caches, meta)
        hidden = self.embedding.lookup(token_ids).mul_(self.embedding_scale)
        residual: torch.Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden, residual = layer.forward(hidden, residual, positions, cache, meta)
        return self.norm.add_apply(hidden, residual)[0]

    def native_layers(self) -> tuple[list[LayerSpec], RMSNorm]:
        specs = [
            layer_spec(
                layer,
                pre_mlp_norm=layer.pre_mlp_norm,
                post_attention_norm=layer.post_attention_norm,
                post_mlp_norm=layer.post_mlp_norm,
            )
            for layer in self.layers
        ]
        return specs, self.norm


def _norm(build: Build, name: str, width: int, hf: Any) -> RMSNorm:
    return RMSNorm(build, name, width, hf.rms_norm_eps, unit_offset=True)


class DecoderLayer:
    def __init__(self, build: Build, hf: Any, index: int, rotary: Rotary) -> None:
        prefix = f"model.layers.{index}"
        self.activation_kind = gated_kind(hf.hidden_activation)
        heads, kv_heads, head_size = hf.num_attention_heads, hf.num_key_value_heads, hf.head_dim
        self.input_norm = _norm(build, f"{prefix}.input_layernorm", hf.hidden_size, hf)
        self.qkv = build.linear(
            {
                f"{prefix}.self_attn.q_proj": heads * head_size,
                f"{prefix}.self_attn.k_proj": kv_heads * head_size,
                f"{prefix}.self_attn.v_proj": kv_heads * head_size,
            },
            hf.hidden_size,
            bias=hf.attention_bias,
        )
        self.q_norm = _norm(build, f"{prefix}.self_attn.q_norm", head_size, hf)
        self.k_norm = _norm(build, f"{prefix}.self_attn.k_norm", head_size, hf)
        self.attention = PagedAttention(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            scale=hf.query_pre_attn_scalar**-0.5,
            rotary=rotary,
            window=layer_window(hf, index),
            softcap=hf.attn_logit_softcapping,
        )
        self.out = build.linear(
            {f"{prefix}.self_attn.o_proj": hf.hidden_size}, heads * head_size, bias=hf.attention_bias
        )
        self.post_attention_norm = _norm(build, f"{prefix}.post_attention_layernorm", hf.hidden_size, hf)
        self.pre_mlp_norm = _norm(build, f"{prefix}.pre_feedforward_layernorm", hf.hidden_size, hf)
        self.gate_up = build.linear(
            {
                f"{prefix}.mlp.gate_proj": hf.intermediate_size,
                f"{prefix}.mlp.up_proj": hf.intermediate_size,
            },
            hf.hidden_size,
        )
        self.activation = gated_activation(hf.hidden_activation)
        self.down = build.linear({f"{prefix}.mlp.down_proj": hf.hidden_size}, hf.intermediate_size)
        self.post_mlp_norm = _norm(build, f"{prefix}.post_feedforward_layernorm", hf.hidden_size, hf)

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        cache: KVCache,
        meta: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden: the previous layer's output, not yet added to ``residual``; both ``[T, H]``."""
        normed, residual = self.input_norm.add_apply(hidden, residual)
        q, k, v = self.attention.split(self.qkv.apply(normed))
        q, k = self.q_norm.apply(q), self.k_norm.apply(k)
        attended = self.out.apply(self.attention.apply(q, k, v, positions, cache, meta))
        attended = self.post_attention_norm.apply(attended)
        normed, residual = self.pre_mlp_norm.add_apply(attended, residual)
        output = self.down.apply(self.activation(self.gate_up.apply(normed)))
        return self.post_mlp_norm.apply(output), residual
