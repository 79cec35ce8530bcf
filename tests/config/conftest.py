"""Tiny model directories; nothing here needs weights or a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aserve.args import AsyncEngineArgs
from aserve.config.engine import EngineConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 256,
    "torch_dtype": "bfloat16",
}

MakeModel = Callable[..., str]
Resolve = Callable[..., EngineConfig]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Writes a config.json, a tiny Llama's with the given keys replaced, and returns its directory."""
    made = 0

    def make(base: dict[str, Any] | None = None, **keys: Any) -> str:
        nonlocal made
        made += 1
        directory = tmp_path / f"model{made}"
        directory.mkdir()
        config = {key: value for key, value in {**(base or LLAMA), **keys}.items() if value is not ...}
        (directory / "config.json").write_text(json.dumps(config))
        return str(directory)

    return make


@pytest.fixture
def resolve(make_model: MakeModel) -> Resolve:
    """Engine config of a tiny model on a CPU, from arguments and, in ``config``, keys of its config.json."""

    def run(config: dict[str, Any] | None = None, **arguments: Any) -> EngineConfig:
        arguments.setdefault("model", make_model(**(config or {})))
        arguments.setdefault("device", "cpu")
        return AsyncEngineArgs(**arguments).create_engine_config()

    return run
