"""Checkpoints written by ``torch.save``: ``*.pt`` and ``*.bin``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aserve.errors import ConfigError
from aserve.model.loader.base import Loader, Weights

if TYPE_CHECKING:
    from aserve.config.model import ModelConfig

PATTERNS = ("*.pt", "*.bin")
_NOT_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}


class PtLoader(Loader):
    format = "pt"

    def weights(self, model_config: ModelConfig, expected: Mapping[str, torch.Size]) -> Weights:
        for pattern in PATTERNS:
            if files := weight_files(self.checkpoint_files(model_config, (pattern,))):
                return read_pt(files)
        raise self.no_files(model_config, PATTERNS)


def weight_files(files: list[Path]) -> list[Path]:
    """``files`` without what a trainer leaves beside the weights."""
    return [path for path in files if path.name not in _NOT_WEIGHTS]


def read_pt(files: list[Path]) -> Weights:
    """Reads tensors only: a pickle that would build anything else is refused, never run."""
    for path in files:
        try:
            state = _load(path)
        except Exception as error:  # a damaged or hostile pickle can fail at any opcode, in any way
            raise ConfigError(f"{path} is not a checkpoint of plain tensors: {error}") from error
        if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]
        if not isinstance(state, Mapping):
            raise ConfigError(f"{path} holds a {type(state).__name__}, not tensors by name")
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                yield name, value


def _load(path: Path) -> object:
    import zipfile

    # Files older than torch 1.6 are not zip archives and cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
