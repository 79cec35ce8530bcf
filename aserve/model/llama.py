"""The Llama shape of decoder: Llama, Mistral, SmolLM, Qwen2 and Qwen3 differ by configuration only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from aserve.attention.base import AttentionMetadata, KVCache
from aserve.errors import ConfigError
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


class LlamaForCausalLM(Model):
    """Pre-norm decoder with rotary positions, grouped-query attention and a gated feed-forward layer.

    Read from the configuration: head sizes, sliding windows, rope scaling, biases (Qwen2 has them on
    q, k and v), norms of q and k by head (Qwen3), tied embeddings.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, device, dtype)
        hf = config.hf_config
        head_size = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        if hf.num_attention_heads % hf.num_key_value_heads:
            raise ConfigError(
                f"{hf.num_attention_heads} attention heads are not a multiple of "
                f"{hf.num_key_value_heads} KV heads"
            )
        rotary = make_rotary(
            rope_parameters(hf, config.rope_scaling),
            head_size=head_size,
            max_position=hf.max_position_embeddings,
            max_model_len=config.max_model_len,
            device=device,
        )
        self.tied = bool(hf.tie_word_embeddings)
        self.embedding = make_embedding(
            self.build, "model.embed_tokens", hf.vocab_size, hf.hidden_size, is_head=self.tied
        )
        self.layers = [
            DecoderLayer(self.build, hf, index, head_size, rotary) for index in range(hf.num_hidden_layers)
        ]
        self.norm = RMSNorm(self.build, "model.norm", hf.hidden_size, hf.rms_norm_eps)
        self.head = OutputHead(self.build, "lm_head", self.embedding, self.tied)
        self.kv_shapes = [(hf.num_key_value_heads, head_size)] * hf.num_hidden_layers

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        caches: list[KVCache],
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        if self._stack is not None:
            return self._stack.forward(self.embedding.lookup_float(token_ids), positions, caches, meta)
        hidden = self.embedding.lookup(token_ids)
        residual: torch.Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden, residual = layer.forward(hidden, residual, positions, cache, meta)
        return self.norm.add_apply(hidden, residual)[0]

    def native_layers(self) -> tuple[list[LayerSpec], RMSNorm]:
        return [layer_spec(layer, pre_mlp_norm=layer.post_norm) for layer in self.layers], self.norm


class DecoderLayer:
    def __init__(self, build: Build, hf: Any, index: int, head_size: int, rotary: Rotary) -> None:
        self.activation_kind = gated_kind(hf.hidden_act)
        prefix = f"model.layers.{index}"
        heads, kv_heads = hf.num_attention_heads, hf.num_key_value_heads
        is_qwen2, is_qwen3 = hf.model_type == "qwen2", hf.model_type == "qwen3"
        attention_bias = bool(getattr(hf, "attention_bias", False))
        mlp_bias = bool(getattr(hf, "mlp_bias", False))
        self.input_norm = RMSNorm(build, f"{prefix}.input_layernorm", hf.hidden_size, hf.rms_norm_eps)
        self.qkv = build.linear(
            {
                f"{prefix}.self_attn.q_proj": heads * head_size,
                f"{prefix}.self_attn.k_proj": kv_heads * head_size,
                f"{prefix}.self_attn.v_proj": kv_heads * head_size,
            },
            hf.hidden_size,
            bias=attention_bias or is_qwen2,
        )
        self.q_norm = self.k_norm = None
        if is_qwen3:
            self.q_norm = RMSNorm(build, f"{prefix}.self_attn.q_norm", head_size, hf.rms_norm_eps)
            self.k_norm = RMSNorm(build, f"{prefix}.self_attn.k_norm", head_size, hf.rms_norm_eps)
        self.attention = PagedAttention(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            scale=head_size**-0.5,
            rotary=rotary,
            window=layer_window(hf, index),
        )
        self.out = build.linear(
            {f"{prefix}.self_attn.o_proj": hf.hidden_size}, heads * head_size, bias=attention_bias
        )
        self.post_norm = RMSNorm(build, f"{prefix}.post_attention_layernorm", hf.hidden_size, hf.rms_norm_eps)
        self.gate_up = build.linear(
            {
                f"{prefix}.mlp.gate_proj": hf.intermediate_size,
                f"{prefix}.mlp.up_proj": hf.intermediate_size,
            },
            hf.hidden_size,
            bias=mlp_bias,
        )
        self.activation = gated_activation(hf.hidden_act)
        self.down = build.linear(
            {f"{prefix}.mlp.down_proj": hf.hidden_size}, hf.intermediate_size, bias=mlp_bias
        )

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
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm.apply(q), self.k_norm.apply(k)
        attended = self.out.apply(self.attention.apply(q, k, v, positions, cache, meta))
        normed, residual = self.post_norm.add_apply(attended, residual)
        return self.down.apply(self.activation(self.gate_up.apply(normed))), residual
