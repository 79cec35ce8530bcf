"""Every name aserve knows, one table per room.

A table maps a name to ``"module:attribute"``; nothing is imported until the name is chosen, so the
command line can list every choice without loading torch. Code outside aserve adds its own with
``registry.models.register("MyForCausalLM", "my_pkg.model:MyForCausalLM")``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from aserve.errors import ConfigError, UnsupportedError


class Registry:
    """A table of lazily imported objects.

    A target of None stands for a name the command line knows and this release does not have yet.
    """

    def __init__(self, kind: str, table: Mapping[str, str | None]) -> None:
        self.kind = kind
        self._table = dict(table)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def names(self) -> list[str]:
        return list(self._table)

    def built(self, name: str) -> bool:
        """Whether ``name`` can be loaded in this release."""
        return self._table.get(name) is not None

    def target(self, name: str) -> str | None:
        """``"module:attribute"`` of a known name, for processes that lack what was registered here."""
        return self._table.get(name)

    def register(self, name: str, target: str) -> None:
        """Adds ``name``; ``target`` is ``"module:attribute"``."""
        if ":" not in target:
            raise ConfigError(f"{self.kind} {name!r}: expected 'module:attribute', got {target!r}")
        self._table[name] = target

    def load(self, name: str) -> Any:
        """Imports and returns what ``name`` stands for; ConfigError lists the known names."""
        if name not in self._table:
            raise ConfigError(f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self._table))}")
        target = self._table[name]
        if target is None:
            built = ", ".join(sorted(known for known in self._table if self.built(known)))
            raise UnsupportedError(
                f"{self.kind} {name!r} is not built in this release; built: {built or 'none'}"
            )
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
        "pt": "aserve.model.loader.pt:PtLoader",
        "safetensors": "aserve.model.loader.safetensors:SafetensorsLoader",
        "npcache": None,
        "dummy": "aserve.model.loader.dummy:DummyLoader",
        "tensorizer": None,
        "gguf": "aserve.model.loader.gguf:GGUFLoader",
    },
)

config_readers = Registry(
    "config reader",
    {"gguf": "aserve.gguf.config:read_config"},
)
"""By file suffix: ``read(path) -> PretrainedConfig`` for weight files that carry their own config."""

quantizations = Registry(
    "quantization method",
    {
        "aqlm": None,
        "awq": None,
        "deepspeedfp": None,
        "fp8": None,
        "gguf": "aserve.model.loader.gguf:GGUFLoader",
        "gptq": None,
        "gptq_marlin": None,
        "gptq_marlin_24": None,
        "marlin": None,
        "sparseml": None,
        "squeezellm": None,
    },
)

executors = Registry(
    "executor",
    {
        "uni": "aserve.executor.uni:UniExecutor",
        "ray": None,
        "mp": None,
    },
)

tokenizer_pools = Registry("tokenizer pool", {"ray": None})

guided_backends = Registry(
    "guided decoding backend",
    {
        "llguidance": "aserve.guided.llguidance:LLGuidanceBackend",
        "outlines": "aserve.guided.outlines:OutlinesBackend",
        "lm-format-enforcer": "aserve.guided.lm_format_enforcer:LMFormatEnforcerBackend",
    },
)

tool_parsers = Registry(
    "tool call parser",
    {
        "hermes": "aserve.server.openai.tools.hermes:HermesReader",
        "llama3-json": "aserve.server.openai.tools.llama3:Llama3Reader",
        "mistral": "aserve.server.openai.tools.mistral:MistralReader",
        "pythonic": "aserve.server.openai.tools.pythonic:PythonicReader",
    },
)
