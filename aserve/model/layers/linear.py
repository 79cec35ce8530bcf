"""Linear layers. Models ask :class:`Build` for one and use only :meth:`Linear.apply`, so how weights are
kept (plain, packed for a kernel, quantised) is chosen in one place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from aserve.model.weights import WeightTable


class Linear(ABC):
    """``y = x W^T + b`` with one or several checkpoint layers stacked along the output.

    ``parts`` maps each checkpoint prefix (``model.layers.0.self_attn.q_proj``) to its output rows, in
    the order the outputs are concatenated.
    """

    def __init__(self, parts: Mapping[str, int], in_features: int) -> None:
        self.parts = dict(parts)
        self.in_features = in_features
        self.out_features = sum(parts.values())

    @abstractmethod
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""

    def finish(self) -> None:  # noqa: B027  nothing to do is a right answer
        """Called once the weights are loaded; the place to pack them."""


class DenseLinear(Linear):
    """Weights as the checkpoint has them, ``[out_features, in_features]`` in the run dtype."""

    def __init__(self, build: Build, parts: Mapping[str, int], in_features: int, bias: bool) -> None:
        super().__init__(parts, in_features)
        self.weight = build.empty(self.out_features, in_features)
        self.bias = build.empty(self.out_features) if bias else None
        start = 0
        for name, rows in self.parts.items():
            build.table.add(f"{name}.weight", self.weight[start : start + rows])
            if self.bias is not None:
                build.table.add(f"{name}.bias", self.bias[start : start + rows])
            start += rows

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


LinearFactory = Callable[["Build", Mapping[str, int], int, bool], Linear]


class Build:
    """What layers share while a model is made: device, dtype, the weight table, the kind of linear."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, linear_factory: LinearFactory = DenseLinear
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.table = WeightTable()
        self._linear_factory = linear_factory
        self._finishers: list[Callable[[], None]] = []

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory for a parameter, in the run dtype unless another is given."""
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def linear(self, parts: Mapping[str, int], in_features: int, bias: bool = False) -> Linear:
        layer = self._linear_factory(self, parts, in_features, bias)
        self.on_loaded(layer.finish)
        return layer

    def on_loaded(self, action: Callable[[], None]) -> None:
        """Runs ``action`` after each load of the weights."""
        self._finishers.append(action)

    def finish(self) -> None:
        for action in self._finishers:
            action()
