"""Activations of gated feed-forward layers, by their configuration names."""

from __future__ import annotations

from collections.abc import Callable

import torch

from aserve import ops
from aserve.errors import ConfigError

_KINDS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: ops.silu_and_mul(x),
    "gelu_tanh": lambda x: ops.gelu_and_mul(x, "tanh"),
    "gelu": lambda x: ops.gelu_and_mul(x, "none"),
}


def gated_kind(name: str) -> str:
    """ "silu", "gelu_tanh" or "gelu". ConfigError: another activation."""
    kind = _KINDS.get(name)
    if kind is None:
        raise ConfigError(
            f"activation {name!r} is not supported in gated layers; known: {', '.join(sorted(_KINDS))}"
        )
    return kind


def gated_activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Activates the first half of ``[..., 2 * d]`` and multiplies by the second: ``[..., d]``."""
    return _FUNCTIONS[gated_kind(name)]
