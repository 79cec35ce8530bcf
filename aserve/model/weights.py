"""Where the tensors of a checkpoint go."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from aserve.errors import ConfigError

_LISTED = 8  # names an error message shows before it says how many more


class WeightTable:
    """Checkpoint names and the memory each fills: a whole parameter, or rows of a merged one."""

    def __init__(self) -> None:
        self._targets: dict[str, torch.Tensor] = {}

    def add(self, name: str, target: torch.Tensor) -> None:
        self._targets[name] = target

    def shapes(self) -> dict[str, torch.Size]:
        """Every expected name with its shape."""
        return {name: target.shape for name, target in self._targets.items()}

    def fill(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        rename: Callable[[str], str | None],
    ) -> None:
        """Copies every tensor to its place, converting dtype and device.

        rename: maps a checkpoint's name to the expected one, or to None for a tensor to pass over.
        ConfigError: a shape differs, or names are missing or unexpected (all are listed).
        """
        missing = dict.fromkeys(self._targets)
        unexpected: list[str] = []
        for original, tensor in weights:
            name = rename(original)
            if name is None:
                continue
            target = self._targets.get(name)
            if target is None:
                unexpected.append(original)
                continue
            if target.shape != tensor.shape:
                raise ConfigError(
                    f"weight {original} has shape {list(tensor.shape)}; "
                    f"the configuration needs {list(target.shape)}"
                )
            target.copy_(tensor)
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
