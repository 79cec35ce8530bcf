"""Small random checkpoints of every supported family, made by transformers."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCABULARY = 160
LENGTH = 45  # tokens of the test sequence; more than two blocks of 16 and five windows

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _COMMON | {"intermediate_size": 80, "num_key_value_heads": 2}
_DIVISORS = {
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.8, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "llama-wide-heads": ("LlamaConfig", _GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", _GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("LlamaConfig", _GROUPED | {"hidden_act": "gelu"}),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen2-windows": (
        "Qwen2Config",
        _GROUPED | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3TextConfig",
        _GROUPED
        | {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": [_LOCAL, _GLOBAL, _LOCAL],
            "query_pre_attn_scalar": 24,
        },
    ),
    "gemma3-untied": (
        "Gemma3TextConfig",
        _GROUPED
        | {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": [_LOCAL, _GLOBAL, _LOCAL],
            "tie_word_embeddings": False,
            "attention_bias": True,
            "rope_parameters": {
                _LOCAL: {"rope_type": "default", "rope_theta": 100.0},
                _GLOBAL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            },
        },
    ),
    "opt": ("OPTConfig", _COMMON | {"ffn_dim": 80}),
    "opt-350m": (
        "OPTConfig",
        _COMMON | {"ffn_dim": 80, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "opt-plain": (
        "OPTConfig",
        _COMMON | {"ffn_dim": 80, "enable_bias": False, "layer_norm_elementwise_affine": False},
    ),
    "rope-linear": ("LlamaConfig", _GROUPED | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "rope-dynamic": ("LlamaConfig", _GROUPED | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "rope-yarn": (
        "LlamaConfig",
        _GROUPED
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,  # a ramp of several frequencies in so few features
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "rope-yarn-tuned": (
        "LlamaConfig",
        _GROUPED
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4,
                "beta_slow": 0.5,
                "mscale": 0.7,
                "mscale_all_dim": 1.2,
                "truncate": False,
            }
        },
    ),
    "rope-longrope": (
        "LlamaConfig",
        _GROUPED
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "original_max_position_embeddings": 50,
                **_DIVISORS,
            }
        },
    ),
    "rope-longrope-long": (
        "LlamaConfig",
        _GROUPED
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "original_max_position_embeddings": 16,
                **_DIVISORS,
            }
        },
    ),
    "rope-llama3": (
        "LlamaConfig",
        _GROUPED
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
}


def make(family: str, **changes: Any) -> Any:
    """The family's transformers model in float32; every weight random, vectors included."""
    class_name, settings = FAMILIES[family]
    config = getattr(transformers, class_name)(**settings | changes)
    torch.manual_seed(len(family))
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.08))
    config.architectures = [type(model).__name__]  # as save_pretrained records it
    return model


@functools.cache
def model(family: str) -> Any:
    return make(family)


def tokens(length: int = LENGTH) -> list[int]:
    return random.Random(3).choices(range(3, VOCABULARY), k=length)


def reference_logits(hf_model: Any, token_ids: list[int]) -> torch.Tensor:
    """float32 ``[tokens, vocabulary]`` by transformers."""
    with torch.inference_mode():
        logits: torch.Tensor = hf_model(torch.tensor([token_ids])).logits[0].float()
    return logits


def save(hf_model: Any, folder: Path, **options: Any) -> Path:
    hf_model.save_pretrained(folder, **options)
    return folder
