"""Checkpoints that the comparison makes for itself, kept in aserve's cache folder."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from aserve import packaged

LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
"""1.04 billion parameters in the shape of Llama 3.2 1B, with a smaller vocabulary."""


def llama_1b() -> Path:
    """A folder with that configuration and no weights, for ``load_format="dummy"``."""
    folder = _folder("llama-1b")
    _write(folder / "config.json", json.dumps(LLAMA_1B, indent=2).encode())
    return folder


def bf16_of(gguf: str) -> Path:
    """The GGUF file's weights in bfloat16 as a Hugging Face folder; made at the first call."""
    path = Path(gguf)
    folder = _folder(f"{path.stem}-{path.stat().st_size}-bf16")
    if not (folder / "model.safetensors").exists():
        import torch
        from safetensors.torch import save

        from aserve.gguf.config import read_config
        from aserve.model.loader.gguf import read_weights
        from aserve.model.weights import QuantizedTensor

        config = read_config(gguf)
        config.dtype = torch.bfloat16
        weights = {}
        for name, value in read_weights(gguf):
            tensor = value.dequantize(torch.bfloat16) if isinstance(value, QuantizedTensor) else value
            weights[name] = tensor.to(torch.bfloat16).contiguous()
        _write(folder / "config.json", config.to_json_string(use_diff=False).encode())
        _write(folder / "model.safetensors", save(weights, {"format": "pt"}))
    return folder


def _folder(name: str) -> Path:
    folder = packaged.cache_dir() / "bench" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(path: Path, data: bytes) -> None:
    """The file appears only when whole."""
    descriptor, aside = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "wb") as out:
        out.write(data)
    os.replace(aside, path)
