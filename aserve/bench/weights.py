"""What a step of a loaded engine reads and computes: the bases of the floors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from aserve.llm import LLM
    from aserve.worker.worker import Worker

_SMALLEST = 64 << 10  # norms and biases are not counted
_NOT_WEIGHTS = frozenset(
    ("build", "table", "config", "cos_sin", "_caches", "_description", "_ends", "_runs", "_logits", "_hidden")
)


def worker_of(llm: LLM) -> Worker:
    """The worker inside an LLM whose executor runs in this process."""
    worker: Worker = llm.llm_engine.executor._worker  # type: ignore[attr-defined]
    return worker


def read_by_a_step(llm: LLM) -> list[torch.Tensor]:
    """The weights that every decode step reads whole: all matrices but an embedding that only gives rows.

    A tied embedding is read by the head and counts, or its float32 copy where it keeps one.
    """
    model: Any = worker_of(llm).model
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    if not model.tied:
        seen.add(id(model.embedding))
    elif getattr(model.embedding, "_wide", None) is not None:
        seen.add(id(model.embedding.weight))
    _collect(model, found, seen)
    return list(found.values())


def _collect(value: Any, found: dict[int, torch.Tensor], seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if value.is_cpu and value.numel() * value.element_size() >= _SMALLEST:
            found[value.data_ptr()] = value
    elif isinstance(value, list | tuple):
        for each in value:
            _collect(each, found, seen)
    elif isinstance(value, dict):
        for each in value.values():
            _collect(each, found, seen)
    elif type(value).__module__.startswith("aserve.") and not type(value).__module__.endswith(".rotary"):
        names = list(getattr(value, "__dict__", {})) + list(getattr(type(value), "__slots__", ()))
        for name in names:
            if name not in _NOT_WEIGHTS:
                _collect(getattr(value, name, None), found, seen)


def multiplications(hf: Any) -> dict[str, float]:
    """Multiplications of a decoder of the Llama or Gemma shape, from its transformers configuration.

    layers: per token, in all layers' matrices. head: per token whose logits are wanted.
    attention: per token and token of context, scores and sums together.
    """
    heads = hf.num_attention_heads
    size = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    kv = hf.num_key_value_heads
    per_layer = hf.hidden_size * size * (2 * heads + 2 * kv) + 3 * hf.hidden_size * hf.intermediate_size
    return {
        "layers": float(per_layer * hf.num_hidden_layers),
        "head": float(hf.hidden_size * hf.vocab_size),
        "attention": float(2 * heads * size * hf.num_hidden_layers),
    }
