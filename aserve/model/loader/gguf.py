"""GGUF files: tensors under the names and in the layout transformers has, matrices still in their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aserve.errors import ConfigError
from aserve.gguf.config import read_config
from aserve.gguf.reader import open_gguf
from aserve.model.loader.base import Loader, Weights
from aserve.model.loader.dequant import dequantize, plain_type
from aserve.model.weights import QuantizedTensor

if TYPE_CHECKING:
    from aserve.config.model import ModelConfig

__all__ = ["GGUFLoader", "read_config", "read_weights"]

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class GGUFLoader(Loader):
    format = "gguf"

    def weights(self, model_config: ModelConfig, expected: Mapping[str, torch.Size]) -> Weights:
        if not Path(model_config.model).is_file():
            raise ConfigError(f"load format 'gguf' needs the path of a .gguf file, not {model_config.model}")
        return read_weights(model_config.model)


def read_weights(path: str) -> Weights:
    """Yields every tensor of the file: quantised matrices as :class:`QuantizedTensor`, plain ones as views
    of the mapped file, vectors in float32.

    llama.cpp stores Llama's q and k rows for rotation of neighbouring pairs and Gemma's norm weights
    with their ``1 +`` included; both are put back as transformers has them.
    """
    file = open_gguf(path)
    is_llama, is_gemma = file.architecture == "llama", file.architecture.startswith("gemma")
    norms = _GEMMA_NORMS if is_gemma else _FFN_NORM
    heads = file.get("attention.head_count")
    kv_heads = file.get("attention.head_count_kv", heads)
    for info in file.tensors.values():
        if info.name == "rope_freqs.weight":  # part of the configuration
            continue
        name = _hf_name(info.name, norms)
        raw = torch.from_numpy(file.tensor_bytes(info))
        pairs = 0  # heads whose rows are stored for rotation of neighbouring pairs
        if is_llama and ".self_attn.q_proj." in name:
            pairs = heads
        elif is_llama and ".self_attn.k_proj." in name:
            pairs = kv_heads
        if len(info.shape) > 1 and plain_type(info.ggml_type) is None:
            order = _to_halves(torch.arange(info.shape[0]), pairs) if pairs else None
            yield name, QuantizedTensor(raw, info.ggml_type, torch.Size(info.shape), order)
            continue
        plain = plain_type(info.ggml_type)
        if plain is not None:
            tensor = raw.view(plain).view(info.shape)
        else:
            tensor = dequantize(raw, info.ggml_type, info.shape, torch.float32)
        if pairs:
            tensor = _to_halves(tensor, pairs)
        elif is_gemma and name.endswith("norm.weight"):
            tensor = tensor.float() - 1.0
        yield name, tensor


def _hf_name(name: str, norms: Mapping[str, str]) -> str:
    """The transformers name; an unknown one is returned as it is, for the model to report."""
    if name in _TOP:
        return _TOP[name]
    if name.startswith("blk."):
        _, layer, middle, suffix = [*name.split("."), "", "", ""][:4]
        renamed = _LAYER.get(middle) or norms.get(middle)
        if renamed is not None:
            return f"model.layers.{layer}.{renamed}.{suffix}"
    return name


def _to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from pair order (0, D/2, 1, D/2+1, ...) to half order (0, 1, ..., D-1)."""
    pairs = rows.view(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
