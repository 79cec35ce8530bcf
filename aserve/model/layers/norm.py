"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from aserve import ops
from aserve.model.layers.linear import Build


class RMSNorm:
    """Root-mean-square norm with the weight ``<name>.weight``.

    ``unit_offset``: the checkpoint stores ``w`` and the norm multiplies by ``1 + w`` (Gemma). The sum is
    kept in float32, since rounding it to bfloat16 would drop most of a small ``w``. So is every weight
    where the native kernels keep hidden states in float32.
    """

    def __init__(self, build: Build, name: str, width: int, eps: float, unit_offset: bool = False) -> None:
        self.weight = build.empty(width, dtype=torch.float32 if unit_offset or build.packed else None)
        self.eps = eps
        build.table.add(f"{name}.weight", self.weight)
        if unit_offset:
            build.on_loaded(self._add_one)

    def _add_one(self) -> None:
        self.weight.add_(1.0)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x: ``[..., width]``."""
        return ops.rms_norm(x, self.weight, self.eps)

    def add_apply(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """``(norm(x + residual), x + residual)``; without a residual, ``(norm(x), x)``."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps), x
        return ops.fused_add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm:
    """Layer norm (Ba et al. 2016); without ``affine`` there is nothing to load."""

    def __init__(self, build: Build, name: str, width: int, eps: float = 1e-5, affine: bool = True) -> None:
        self.width, self.eps = width, eps
        self.weight = build.empty(width) if affine else None
        self.bias = build.empty(width) if affine else None
        if self.weight is not None and self.bias is not None:
            build.table.add(f"{name}.weight", self.weight)
            build.table.add(f"{name}.bias", self.bias)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)
