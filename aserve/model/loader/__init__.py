"""Making a model and filling it with weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from aserve.config.load import LoadConfig
    from aserve.config.model import ModelConfig
    from aserve.model.base import Model


def load_model(model_config: ModelConfig, load_config: LoadConfig, device: torch.device) -> Model:
    """The model of ``model_config`` on ``device`` in its dtype, ready to run.

    ConfigError: unknown architecture or load format, no such files, or weights that do not fit.
    """
    import torch

    from aserve import registry

    model_class = registry.models.load(model_config.architecture)
    loader = registry.loaders.load(load_config.load_format)(load_config)
    dtype = getattr(torch, model_config.dtype)
    # Tensors made in inference mode could never be updated outside it.
    with torch.inference_mode(False), torch.no_grad(), _one_thread():
        model: Model = model_class(model_config, device, dtype)
        model.load_weights(loader.weights(model_config, model.build.table.shapes()))
    return model


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch to one thread: copying weights is many short operations, and while other programs use
    the cores each would wait for the slowest thread (seconds become a minute).
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
