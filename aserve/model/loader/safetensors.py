"""``*.safetensors``, single or sharded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aserve.errors import ConfigError
from aserve.model.loader.base import Loader, Weights

if TYPE_CHECKING:
    from aserve.config.model import ModelConfig

PATTERNS = ("*.safetensors",)
_INDEX = "model.safetensors.index.json"


class SafetensorsLoader(Loader):
    format = "safetensors"

    def weights(self, model_config: ModelConfig, expected: Mapping[str, torch.Size]) -> Weights:
        files = self.checkpoint_files(model_config, PATTERNS)
        if not files:
            raise self.no_files(model_config, PATTERNS)
        return read_safetensors(listed_files(files))


def listed_files(files: list[Path]) -> list[Path]:
    """Of ``files``, those the folder's index lists (a repository may also hold a consolidated copy)."""
    folder = files[0].parent
    index = folder / _INDEX
    if not index.is_file():
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{index} is not a safetensors index: {error!r}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{index} lists files that are not there: {', '.join(missing)}")
    return [folder / name for name in names]


def read_safetensors(files: list[Path]) -> Weights:
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework="pt") as checkpoint:
                for name in checkpoint.keys():  # noqa: SIM118  not a dict
                    yield name, checkpoint.get_tensor(name)
        except SafetensorError as error:
            raise ConfigError(f"{path} is not a whole safetensors file: {error}") from error
