"""Token embeddings and the output head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from aserve.model.layers.linear import Build, Linear


class Embedding:
    """A table ``[rows, width]`` named ``<name>.weight`` in the checkpoint."""

    def __init__(self, build: Build, name: str, rows: int, width: int) -> None:
        self.weight = build.empty(rows, width)
        build.table.add(f"{name}.weight", self.weight)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 ``[T]``; returns ``[T, width]``."""
        return F.embedding(ids, self.weight)


class TiedLinear(Linear):
    """An output head that reads the rows of an embedding."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__({}, embedding.weight.shape[1])
        self.weight = embedding.weight
        self.out_features = embedding.weight.shape[0]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


_WIDE_BYTES = 256 << 20
"""A head whose float32 copy is no larger than this keeps one, on a CPU."""


class OutputHead:
    """Hidden states to logits.

    Half-precision products round logits to 8 or 11 bits, and likely tokens then tie: a small model's
    greedy answer is decided by the rounding. On a CPU a head that is small enough is therefore computed
    from a float32 copy of its weights.

    ``softcap`` bounds the logits: ``softcap * tanh(logits / softcap)`` (Gemma 2).
    """

    def __init__(
        self, build: Build, name: str, embedding: Embedding, tied: bool, softcap: float | None = None
    ) -> None:
        rows, width = embedding.weight.shape
        self.linear: Linear = TiedLinear(embedding) if tied else build.linear({name: rows}, width)
        self.softcap = softcap
        self._wide: torch.Tensor | None = None
        build.on_loaded(self._widen)

    def _widen(self) -> None:
        weight = getattr(self.linear, "weight", None)  # packed linears have none
        if weight is None or weight.device.type != "cpu" or weight.dtype is torch.float32:
            return
        if weight.numel() * torch.float32.itemsize <= _WIDE_BYTES:
            self._wide = weight.float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[N, width]`` to float32 ``[N, rows]``."""
        if self._wide is not None:
            logits = F.linear(hidden.float(), self._wide)
        else:
            logits = self.linear.apply(hidden).float()
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
