"""The format by what is there: a GGUF file, then safetensors, ``.bin``, ``.pt``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aserve.model.loader import gguf, pt, safetensors
from aserve.model.loader.base import Loader, Weights

if TYPE_CHECKING:
    import torch

    from aserve.config.model import ModelConfig

_PATTERNS = ("*.safetensors", "*.bin", "*.pt")


class AutoLoader(Loader):
    format = "auto"

    def weights(self, model_config: ModelConfig, expected: Mapping[str, torch.Size]) -> Weights:
        path = Path(model_config.model)
        if path.suffix.lower() == ".gguf":
            return gguf.read_weights(str(path))
        if path.is_dir() or not path.exists():
            for pattern in _PATTERNS:
                files = self.checkpoint_files(model_config, (pattern,))
                if pattern == "*.safetensors":
                    if files:
                        return safetensors.read_safetensors(safetensors.listed_files(files))
                elif files := pt.weight_files(files):
                    return pt.read_pt(files)
        raise self.no_files(model_config, _PATTERNS)
