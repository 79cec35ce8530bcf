"""Every name aserve knows, one table per room.

A table maps a name to ``"module:attribute"``; nothing is imported until the name is chosen, so the
command line can list every choice without loading torch. Code outside aserve adds its own with
``registry.models.register("MyForCausalLM", "my_pkg.model:MyForCausalLM")``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from aserve.errors import ConfigError


class Registry:
    """A table of lazily imported objects."""

    def __init__(self, kind: str, table: dict[str, str]) -> None:
        self.kind = kind
        self._table = dict(table)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def names(self) -> list[str]:
        return list(self._table)

    def register(self, name: str, target: str) -> None:
        """Adds ``name``; ``target`` is ``"module:attribute"``."""
        if ":" not in target:
            raise ConfigError(f"{self.kind} {name!r}: expected 'module:attribute', got {target!r}")
        self._table[name] = target

    def load(self, name: str) -> Any:
        """Imports and returns what ``name`` stands for; ConfigError lists the known names."""
        target = self._table.get(name)
        if target is None:
            known = ", ".join(sorted(self._table))
            raise ConfigError(f"unknown {self.kind} {name!r}; known: {known}")
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)


models = Registry(
    "model architecture",
    {
        "Gemma3ForCausalLM": "aserve.model.gemma3:Gemma3ForCausalLM",
        "LlamaForCausalLM": "aserve.model.llama:LlamaForCausalLM",
        "MistralForCausalLM": "aserve.model.llama:LlamaForCausalLM",
        "OPTForCausalLM": "aserve.model.opt:OPTForCausalLM",
        "Qwen2ForCausalLM": "aserve.model.llama:LlamaForCausalLM",
        "Qwen3ForCausalLM": "aserve.model.llama:LlamaForCausalLM",
    },
)

loaders = Registry(
    "load format",
    {
        "auto": "aserve.model.loader.auto:AutoLoader",
        "dummy": "aserve.model.loader.dummy:DummyLoader",
        "gguf": "aserve.model.loader.gguf:GGUFLoader",
        "pt": "aserve.model.loader.pt:PtLoader",
        "safetensors": "aserve.model.loader.safetensors:SafetensorsLoader",
    },
)

executors = Registry(
    "executor",
    {"uni": "aserve.executor.uni:UniExecutor"},
)
