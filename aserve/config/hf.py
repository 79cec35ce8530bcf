"""Reading a model's own config, and the few facts in it that configs spell in several ways."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from aserve import registry
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def is_gguf(model: str) -> bool:
    """Whether ``model`` is the path of a .gguf file."""
    return model.lower().endswith(".gguf")


def read_hf_config(
    model: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    code_revision: str | None = None,
    download_dir: str | None = None,
) -> PretrainedConfig:
    """The config of a local directory, a .gguf file or a model on the hub.

    ConfigError: nothing there, unreadable, or code of its own without ``trust_remote_code``.
    """
    config: PretrainedConfig
    if is_gguf(model):
        if not os.path.isfile(model):
            raise ConfigError(f"model: no such file: {model}", param="model")
        config = registry.config_readers.load("gguf")(model)
        return config
    if os.path.isdir(model) and not os.path.isfile(os.path.join(model, "config.json")):
        raise ConfigError(f"model: there is no config.json in {model}", param="model")

    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            model,
            trust_remote_code=trust_remote_code,
            revision=revision,
            code_revision=code_revision,
            cache_dir=download_dir,
        )
    except Exception as error:  # a config may break the library reading it in any way
        message = str(error)
        if "trust_remote_code" in message:
            raise ConfigError(
                f"model: {model} needs its own Python code; read it, and if you trust it pass "
                "--trust-remote-code (trust_remote_code=True)",
                param="trust_remote_code",
            ) from error
        raise ConfigError(f"model: cannot read the config of {model}: {message}", param="model") from error
    return config


def text_config(hf_config: PretrainedConfig) -> Any:
    """The part of the config that describes the language model."""
    return hf_config.get_text_config()


def resolve_architecture(hf_config: PretrainedConfig) -> str:
    """The first of the config's architectures that aserve has; ConfigError lists the known ones."""
    named = list(hf_config.architectures or [])
    for name in named:
        if name in registry.models:
            return name
    raise ConfigError(
        f"model architecture {', '.join(named) or '(none named in its config)'} is not known; "
        f"known: {', '.join(sorted(registry.models))}",
        param="model",
    )


def sliding_window(config: Any) -> int | None:
    """Window in tokens, None when no layer uses one."""
    window: int | None = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    layers = getattr(config, "layer_types", None)
    if layers and "sliding_attention" not in layers:
        return None
    return window


def uniform_window(config: Any) -> int | None:
    """Window in tokens if every layer has it, None if any layer sees everything."""
    layers = getattr(config, "layer_types", None)
    if layers:
        everywhere = set(layers) == {"sliding_attention"}
    else:
        # Without a list, the first max_window_layers layers see everything.
        everywhere = not getattr(config, "max_window_layers", 0)
    return sliding_window(config) if everywhere else None


def quantization_dict(hf_config: PretrainedConfig) -> dict[str, Any] | None:
    """What the checkpoint says about its quantisation, or None."""
    for name in ("quantization_config", "compression_config"):
        for holder in (hf_config, text_config(hf_config)):
            found = getattr(holder, name, None)
            if found:
                return dict(found if isinstance(found, dict) else found.to_dict())
    return None
