"""aserve: an asyncio-native LLM inference engine and streaming server.

Public names are imported on first use, so ``import aserve`` costs nothing. That of an engine sets
OMP_WAIT_POLICY to PASSIVE in the environment if it is not set: see ``aserve.threads``.
"""

from __future__ import annotations

import importlib
from typing import Any

from aserve.threads import calm_threads

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngineArgs": "aserve.args",
    "AsyncEngineDeadError": "aserve.errors",
    "AsyncLLMEngine": "aserve.engine.async_engine",
    "CompletionOutput": "aserve.messages.outputs",
    "EmbeddingRequestOutput": "aserve.messages.outputs",
    "EngineArgs": "aserve.args",
    "GuidedParams": "aserve.messages.params",
    "LLM": "aserve.llm",
    "LLMEngine": "aserve.engine.llm_engine",
    "LoRARequest": "aserve.messages.inputs",
    "Logprob": "aserve.messages.outputs",
    "PoolingParams": "aserve.messages.inputs",
    "RequestOutput": "aserve.messages.outputs",
    "SamplingParams": "aserve.messages.params",
}

__all__ = [  # noqa: RUF022 - plain alphabetical order
    "AsyncEngineArgs",
    "AsyncEngineDeadError",
    "AsyncLLMEngine",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "GuidedParams",
    "LLM",
    "LLMEngine",
    "LoRARequest",
    "Logprob",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


_ENGINES = ("AsyncLLMEngine", "LLM", "LLMEngine")


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'aserve' has no attribute {name!r}")
    if name in _ENGINES:
        calm_threads()
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
