"""Linear layers. Models ask :class:`Build` for one and use only :meth:`Linear.apply`, so how weights are
kept (plain, packed for the native kernels, quantised) is chosen in one place.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from aserve.model.weights import QuantizedTensor, Value, WeightTable
from aserve.ops import packed
from aserve.ops.packed import PackedWeight


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


class PackedMatrix:
    """Where a checkpoint's matrix is packed as it arrives, so that no second copy of it is kept.

    dtype: what the matrix is converted to, unless it is to stay ``quantized``.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, quantized: bool) -> None:
        self.shape = torch.Size((rows, columns))
        self._dtype = dtype
        self._quantized = quantized
        self._packed: PackedWeight | None = None
        self._bias: torch.Tensor | None = None

    def add_bias(self) -> torch.Tensor:
        """Memory for a bias, float32 ``[rows]``, to be filled from the checkpoint."""
        self._bias = torch.empty(self.shape[0])
        return self._bias

    def fill(self, value: Value) -> None:
        rows, columns = self.shape
        if not isinstance(value, QuantizedTensor):
            # A 16-bit matrix of a quantised checkpoint stays as it is too.
            keep = self._quantized and value.dtype in packed.DENSE_DTYPES
            new = packed.pack(value if keep else value.to(self._dtype))
        elif self._quantized and packed.can_pack_gguf(value.ggml_type):
            new = packed.pack_gguf(value.raw, value.ggml_type, (rows, columns), value.row_order)
        else:
            new = packed.pack(value.dequantize(self._dtype))
        self._packed = dataclasses.replace(new, bias=self._bias)

    @property
    def weight(self) -> PackedWeight:
        if self._packed is None:
            raise RuntimeError("the weights have not been loaded")
        return self._packed


class PackedLinear(Linear):
    """Weights in the order the native kernels read them, each checkpoint layer by itself."""

    def __init__(self, build: Build, parts: Mapping[str, int], in_features: int, bias: bool) -> None:
        super().__init__(parts, in_features)
        self._matrices = []
        for name, rows in self.parts.items():
            matrix = build.matrix(rows, in_features)
            build.table.add(f"{name}.weight", matrix)
            if bias:
                build.table.add(f"{name}.bias", matrix.add_bias())
            self._matrices.append(matrix)

    @property
    def weights(self) -> list[PackedWeight]:
        """One for each of ``parts``, in their order."""
        return [matrix.weight for matrix in self._matrices]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [packed.linear(x, weight) for weight in self.weights]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def packed_weights(layer: Linear) -> list[PackedWeight]:
    """The weights of a layer that :class:`Build` made with ``packed``, one for each checkpoint layer."""
    if not isinstance(layer, PackedLinear):
        raise TypeError("the layer's weights are not packed")
    return layer.weights


class Build:
    """What layers share while a model is made: device, dtype, the weight table, how matrices are kept.

    packed: keep matrices packed for the native kernels. quantized: matrices that a checkpoint stores
    quantised stay so (only with ``packed``); otherwise every matrix is converted to ``dtype``.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, *, packed: bool = False, quantized: bool = False
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.packed = packed
        self.quantized = quantized
        self.table = WeightTable()
        self._finishers: list[Callable[[], None]] = []

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory for a parameter, in the run dtype unless another is given."""
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def matrix(self, rows: int, columns: int) -> PackedMatrix:
        return PackedMatrix(rows, columns, self.dtype, self.quantized)

    def linear(self, parts: Mapping[str, int], in_features: int, bias: bool = False) -> Linear:
        kind = PackedLinear if self.packed else DenseLinear
        return kind(self, parts, in_features, bias)

    def on_loaded(self, action: Callable[[], None]) -> None:
        """Runs ``action`` after each load of the weights."""
        self._finishers.append(action)

    def finish(self) -> None:
        for action in self._finishers:
            action()
