"""A transformers configuration from a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from aserve.errors import ConfigError
from aserve.gguf.reader import GGUFFile, open_gguf

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# GGUF keys (under "<architecture>.") and the transformers fields that every supported family shares.
_COMMON = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_TOKEN_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}
_GEMMA3_27B_LAYERS = 62


def read_config(path: str) -> PretrainedConfig:
    """Configuration of the model in the GGUF file ``path``.

    ``config.dtype`` is the type of the file's weights, bfloat16 when they are quantised.
    ConfigError: not a GGUF file, a key is missing, or an architecture that is not supported.
    """
    file = open_gguf(path)
    build = _BUILDERS.get(file.architecture)
    if build is None:
        known = ", ".join(sorted(_BUILDERS))
        raise ConfigError(f"{path}: GGUF architecture {file.architecture!r} is not supported; known: {known}")
    if file.get("expert_count", 0):
        raise ConfigError(f"{path}: mixture-of-experts GGUF files are not supported")
    config: PretrainedConfig = build(file)
    return config


def _shared_fields(file: GGUFFile) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, name in _COMMON.items():
        value = file.get(key)
        if value is None:
            raise ConfigError(f"{file.path}: GGUF key {file.architecture}.{key} is missing")
        if isinstance(value, np.ndarray):
            raise ConfigError(f"{file.path}: {file.architecture}.{key} differs between layers")
        fields[name] = value
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = file.get("attention.head_count_kv", heads)
    default_head = file.get("rope.dimension_count", fields["hidden_size"] // heads)
    fields["head_dim"] = file.get("attention.key_length", default_head)
    for key, name in _TOKEN_IDS.items():
        fields[name] = file.metadata.get(f"tokenizer.ggml.{key}")
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None:
        raise ConfigError(f"{file.path}: tensor token_embd.weight is missing")
    fields["vocab_size"] = embeddings.shape[0]
    fields["dtype"] = _weight_dtype(file)
    return fields


def _weight_dtype(file: GGUFFile) -> str:
    matrix = file.tensors.get("blk.0.attn_output.weight", file.tensors["token_embd.weight"])
    return {0: "float32", 1: "float16"}.get(matrix.ggml_type, "bfloat16")


def _rope_parameters(file: GGUFFile, default_theta: float) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(file.get("rope.freq_base", default_theta)),
    }
    factors = file.tensors.get("rope_freqs.weight")
    scaling = file.get("rope.scaling.type", "none")
    original = int(file.get("rope.scaling.original_context_length", file.get("context_length")))
    if factors is not None:
        # Llama 3.1 style scaling, stored as one divisor per frequency: LongRoPE with equal factors.
        divisors = file.tensor_bytes(factors).view(np.float32).tolist()
        rope |= {
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": original,
        }
    elif scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": float(file.get("rope.scaling.factor", 1.0))}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = original
    elif scaling != "none":
        raise ConfigError(f"{file.path}: rope scaling type {scaling!r} is not supported in GGUF files")
    return rope


def _llama(file: GGUFFile) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        rope_parameters=_rope_parameters(file, 10000.0),
        **_shared_fields(file),
    )


def _qwen2(file: GGUFFile) -> PretrainedConfig:
    from transformers import Qwen2Config

    fields = _shared_fields(file)
    del fields["head_dim"]  # Qwen2 derives it; the configuration class has no such field
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"], rope_parameters=_rope_parameters(file, 10000.0), **fields
    )


def _qwen3(file: GGUFFile) -> PretrainedConfig:
    from transformers import Qwen3Config

    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        rope_parameters=_rope_parameters(file, 10000.0),
        **_shared_fields(file),
    )


def _gemma3(file: GGUFFile) -> PretrainedConfig:
    """The text half of Gemma 3.

    The local rope base and, in files that lack it, the period of full-attention layers are constants of
    the family, as is the query scale: head size, but for the 27B model hidden size over heads.
    """
    from transformers import Gemma3TextConfig

    fields = _shared_fields(file)
    scale = fields["head_dim"]
    if fields["num_hidden_layers"] == _GEMMA3_27B_LAYERS:
        scale = fields["hidden_size"] // fields["num_attention_heads"]
    pattern = file.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, np.ndarray):
        fields["layer_types"] = ["sliding_attention" if local else "full_attention" for local in pattern]
    else:
        fields["sliding_window_pattern"] = pattern
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=scale,
        sliding_window=file.get("attention.sliding_window"),
        attn_logit_softcapping=file.get("attn_logit_softcapping"),
        final_logit_softcapping=file.get("final_logit_softcapping"),
        rope_parameters={
            "full_attention": _rope_parameters(file, 1_000_000.0),
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": float(file.get("rope.freq_base_swa", 10000.0)),
            },
        },
        **fields,
    )


_BUILDERS: dict[str, Callable[[GGUFFile], Any]] = {
    "gemma3": _gemma3,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
