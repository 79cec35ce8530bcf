"""Which loader reads the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aserve import registry
from aserve.config.hf import is_gguf
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from aserve.args import EngineArgs

_TAKE_EXTRA_CONFIG = ("tensorizer",)


@dataclass(frozen=True)
class LoadConfig:
    """``load_format`` is a name in ``registry.loaders``; a .gguf file under "auto" becomes "gguf"."""

    load_format: str
    download_dir: str | None
    extra_config: dict[str, Any] = field(default_factory=dict)


def resolve_load_config(args: EngineArgs, model_path: str) -> LoadConfig:
    """``model_path`` is the model with packaged names already resolved."""
    load_format = args.load_format.lower()
    if load_format not in registry.loaders:
        raise ConfigError(
            f"load_format must be one of {', '.join(registry.loaders)}, got {args.load_format!r}",
            param="load_format",
        )
    gguf = is_gguf(model_path)
    if gguf and load_format == "auto":
        load_format = "gguf"
    if gguf and load_format not in ("gguf", "dummy"):
        raise ConfigError(
            f"load_format {load_format!r} cannot read the .gguf file {model_path}; use 'auto' or 'gguf'",
            param="load_format",
        )
    if load_format == "gguf" and not gguf:
        raise ConfigError(
            f"load_format 'gguf' needs the path of a .gguf file as model, got {model_path}",
            param="load_format",
        )
    extra = json_dict("model_loader_extra_config", args.model_loader_extra_config)
    if extra and load_format not in _TAKE_EXTRA_CONFIG:
        raise ConfigError(
            f"model_loader_extra_config: load format {load_format!r} takes none",
            param="model_loader_extra_config",
        )
    return LoadConfig(load_format=load_format, download_dir=args.download_dir, extra_config=extra)


def json_dict(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A dict given as such or as JSON text; None is the empty dict. ConfigError names ``name``."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{name} is not JSON ({error}): {value!r}", param=name) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a JSON object, got {value!r}", param=name)
    return value
