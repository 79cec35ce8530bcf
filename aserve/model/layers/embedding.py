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
        self.embedding = embedding
        self.out_features = embedding.weight.shape[0]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.embedding.weight)


class OutputHead:
    """Hidden states to logits.

    ``softcap`` bounds them: ``softcap * tanh(logits / softcap)`` (Gemma 2).
    """

    def __init__(
        self, build: Build, name: str, embedding: Embedding, tied: bool, softcap: float | None = None
    ) -> None:
        rows, width = embedding.weight.shape
        self.linear: Linear = TiedLinear(embedding) if tied else build.linear({name: rows}, width)
        self.softcap = softcap

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[N, width]`` to float32 ``[N, rows]``."""
        logits = self.linear.apply(hidden).float()
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
