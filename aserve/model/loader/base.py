"""Finding a checkpoint's files and iterating over its tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aserve.errors import ConfigError
from aserve.model.weights import Value

if TYPE_CHECKING:
    from aserve.config.load import LoadConfig
    from aserve.config.model import ModelConfig

Weights = Iterator[tuple[str, Value]]


class Loader(ABC):
    """One load format. ``format`` is its name in messages."""

    format: str

    def __init__(self, load_config: LoadConfig) -> None:
        if load_config.extra_config:
            raise ConfigError(
                f"load format {self.format!r} takes no model_loader_extra_config; "
                f"got {sorted(load_config.extra_config)}"
            )
        self.load_config = load_config

    @abstractmethod
    def weights(self, model_config: ModelConfig, expected: Mapping[str, torch.Size]) -> Weights:
        """Yields ``(name, tensor)`` with the names and meaning transformers saves.

        expected: names and shapes the model has. The tensors may be views of a mapped file and of any
        dtype. ConfigError: no file of this format.
        """

    def checkpoint_files(self, model_config: ModelConfig, patterns: Sequence[str]) -> list[Path]:
        """Files matching the first of ``patterns`` that matches any; empty when none does.

        A model that is no local path is looked up on the hub (or in its cache) first.
        """
        folder = Path(model_config.model)
        if not folder.exists():
            folder = self._download(model_config, patterns)
        if not folder.is_dir():
            return []
        for pattern in patterns:
            if files := sorted(path for path in folder.glob(pattern) if path.is_file()):
                return files
        return []

    def no_files(self, model_config: ModelConfig, patterns: Sequence[str]) -> ConfigError:
        return ConfigError(
            f"no weights of load format {self.format!r} ({', '.join(patterns)}) in {model_config.model}"
        )

    def _download(self, model_config: ModelConfig, patterns: Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        folder = Path(model_config.model)
        try:
            for pattern in patterns:
                folder = Path(
                    snapshot_download(
                        model_config.model,
                        revision=model_config.revision,
                        cache_dir=self.load_config.download_dir,
                        allow_patterns=[pattern, "*.index.json"],
                    )
                )
                if any(folder.glob(pattern)):
                    break
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise ConfigError(
                f"model {model_config.model!r} is neither a local path nor to be had from the hub: {error}"
            ) from error
        return folder
