"""Random weights, for profiling and tests without a checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from aserve.model.loader.base import Loader, Weights

if TYPE_CHECKING:
    from aserve.config.model import ModelConfig

_BOUND = 1e-3


class DummyLoader(Loader):
    """Uniform in [-1e-3, 1e-3), the same values for the same name and shape every time."""

    format = "dummy"

    def weights(self, model_config: ModelConfig, expected: Mapping[str, torch.Size]) -> Weights:
        generator = torch.Generator()
        for name, shape in expected.items():
            generator.manual_seed(zlib.crc32(name.encode()))
            yield name, torch.empty(shape).uniform_(-_BOUND, _BOUND, generator=generator)
