"""Token embeddings and the output head."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F

from aserve.model.layers.linear import Build
from aserve.ops import packed as packed_weights
from aserve.ops.packed import PackedWeight

_WIDE_BYTES = 256 << 20
"""A head whose float32 copy is no larger than this keeps one, on a CPU."""


class Embedding(ABC):
    """A table ``[rows, width]`` named ``<name>.weight`` in the checkpoint."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width = rows, width

    @abstractmethod
    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 ``[T]``; returns ``[T, width]`` in the run dtype."""

    @abstractmethod
    def lookup_float(self, ids: torch.Tensor) -> torch.Tensor:
        """As :meth:`lookup`, in float32."""

    @property
    def packed(self) -> PackedWeight | None:
        """The table as the native kernels read it, if it is kept so."""
        return None

    @abstractmethod
    def scores(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``[N, width]`` times every row of the table: float32 ``[N, rows]``, in ``out`` if it serves."""


def make_embedding(build: Build, name: str, rows: int, width: int, *, is_head: bool = False) -> Embedding:
    """``is_head`` says that :meth:`Embedding.scores` will be called."""
    if build.packed:
        return PackedEmbedding(build, name, rows, width)
    return DenseEmbedding(build, name, rows, width, is_head=is_head)


class PackedEmbedding(Embedding):
    """Rows packed for the native kernels, which give float32 scores whatever the weights are kept in."""

    def __init__(self, build: Build, name: str, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self._matrix = build.matrix(rows, width)
        self._dtype = build.dtype
        build.table.add(f"{name}.weight", self._matrix)

    @property
    def packed(self) -> PackedWeight | None:
        return self._matrix.weight

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lookup_float(ids).to(self._dtype)

    def lookup_float(self, ids: torch.Tensor) -> torch.Tensor:
        return packed_weights.rows(self._matrix.weight, ids)

    def scores(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return packed_weights.linear_float(hidden, self._matrix.weight, out)


class DenseEmbedding(Embedding):
    """Rows in the run dtype.

    Half-precision products round logits to 8 or 11 bits, and likely tokens then tie: a small model's
    greedy answer is decided by the rounding. On a CPU a head that is small enough is therefore computed
    from a float32 copy of its weights.
    """

    def __init__(self, build: Build, name: str, rows: int, width: int, *, is_head: bool) -> None:
        super().__init__(rows, width)
        self.weight = build.empty(rows, width)
        self._wide: torch.Tensor | None = None
        build.table.add(f"{name}.weight", self.weight)
        if is_head:
            build.on_loaded(self._widen)

    def _widen(self) -> None:
        if self.weight.device.type != "cpu" or self.weight.dtype is torch.float32:
            return
        if self.weight.numel() * torch.float32.itemsize <= _WIDE_BYTES:
            self._wide = self.weight.float()

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)

    def lookup_float(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lookup(ids).float()

    def scores(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if self._wide is not None:
            return F.linear(hidden.float(), self._wide)
        return F.linear(hidden, self.weight).float()


class OutputHead:
    """Hidden states to logits, with the rows of the embedding (``tied``) or of a table of its own.

    ``softcap`` bounds the logits: ``softcap * tanh(logits / softcap)`` (Gemma 2).
    """

    def __init__(
        self, build: Build, name: str, embedding: Embedding, tied: bool, softcap: float | None = None
    ) -> None:
        self.softcap = softcap
        self._table = embedding
        if not tied:
            self._table = make_embedding(build, name, embedding.rows, embedding.width, is_head=True)

    @property
    def packed(self) -> PackedWeight | None:
        """The weights where their product with hidden states is the logits; None with a softcap."""
        return self._table.packed if self.softcap is None else None

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``[N, width]`` to float32 ``[N, rows]``, in ``out`` if it serves."""
        logits = self._table.scores(hidden, out)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
