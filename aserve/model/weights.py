"""Where the tensors of a checkpoint go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from aserve.errors import ConfigError
from aserve.model.loader.dequant import dequantize

_LISTED = 8  # names an error message shows before it says how many more


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix in the blocks of a GGUF file.

    raw: its bytes, uint8, 1-D. row_order: int64 ``[rows]``; row ``i`` of the matrix is the file's row
    ``row_order[i]``. None: the file's own order.
    """

    raw: torch.Tensor
    ggml_type: int
    shape: torch.Size
    row_order: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        rows = dequantize(self.raw, self.ggml_type, tuple(self.shape), dtype)
        return rows if self.row_order is None else rows[self.row_order]


Value = torch.Tensor | QuantizedTensor


class Target(Protocol):
    """A place for one tensor of a checkpoint."""

    @property
    def shape(self) -> torch.Size: ...

    def fill(self, value: Value) -> None: ...


class _Memory:
    """A parameter, or rows of a merged one."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory

    @property
    def shape(self) -> torch.Size:
        return self._memory.shape

    def fill(self, value: Value) -> None:
        if isinstance(value, QuantizedTensor):
            value = value.dequantize(self._memory.dtype)
        self._memory.copy_(value)


class WeightTable:
    """Checkpoint names and the place each goes to."""

    def __init__(self) -> None:
        self._targets: dict[str, Target] = {}

    def add(self, name: str, target: torch.Tensor | Target) -> None:
        self._targets[name] = _Memory(target) if isinstance(target, torch.Tensor) else target

    def shapes(self) -> dict[str, torch.Size]:
        """Every expected name with its shape."""
        return {name: target.shape for name, target in self._targets.items()}

    def fill(
        self,
        weights: Iterable[tuple[str, Value]],
        rename: Callable[[str], str | None],
    ) -> None:
        """Puts every tensor in its place, converting dtype and device.

        rename: maps a checkpoint's name to the expected one, or to None for a tensor to pass over.
        ConfigError: a shape differs, or names are missing or unexpected (all are listed).
        """
        missing = dict.fromkeys(self._targets)
        unexpected: list[str] = []
        for original, value in weights:
            name = rename(original)
            if name is None:
                continue
            target = self._targets.get(name)
            if target is None:
                unexpected.append(original)
                continue
            if target.shape != value.shape:
                raise ConfigError(
                    f"weight {original} has shape {list(value.shape)}; "
                    f"the configuration needs {list(target.shape)}"
                )
            target.fill(value)
            missing.pop(name, None)
        problems = []
        if missing:
            problems.append(f"missing: {_names(list(missing))}")
        if unexpected:
            problems.append(f"unexpected: {_names(unexpected)}")
        if problems:
            raise ConfigError(f"the checkpoint does not fit the model; {'; '.join(problems)}")


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    rest = len(names) - _LISTED
    return f"{shown} and {rest} more" if rest > 0 else shown
