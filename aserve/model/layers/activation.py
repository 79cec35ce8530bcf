"""Activations of gated feed-forward layers, by their configuration names."""

from __future__ import annotations

from collections.abc import Callable

import torch

from aserve import ops
from aserve.errors import ConfigError


def gated_activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Activates the first half of ``[..., 2 * d]`` and multiplies by the second: ``[..., d]``."""
    if name == "silu":
        return lambda x: ops.silu_and_mul(x)
    if name in ("gelu_pytorch_tanh", "gelu_new"):
        return lambda x: ops.gelu_and_mul(x, "tanh")
    if name == "gelu":
        return lambda x: ops.gelu_and_mul(x, "none")
    raise ConfigError(
        f"activation {name!r} is not supported in gated layers; "
        "known: gelu, gelu_new, gelu_pytorch_tanh, silu"
    )
