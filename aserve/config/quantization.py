"""Which quantisation method reads a checkpoint's weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from aserve import registry
from aserve.config.device import DeviceConfig
from aserve.errors import ConfigError, UnsupportedError

logger = logging.getLogger(__name__)

_SIDE_FILES: dict[str, tuple[str, ...]] = {
    "awq": ("quant_config.json", "quantize_config.json"),
    "gptq": ("quantize_config.json",),
    "gptq_marlin": ("quantize_config.json",),
    "marlin": ("quantize_config.json",),
    "squeezellm": ("quant_config.json",),
}
_MARLIN_BITS = (4, 8)
_MARLIN_GROUPS = (-1, 32, 64, 128)

_GPU_DTYPES: dict[str, tuple[str, ...]] = {
    "awq": ("float16",),
    "gptq": ("float16",),
    "squeezellm": ("float16",),
    "fp8": ("float16", "bfloat16"),
    "gptq_marlin": ("float16", "bfloat16"),
}
_GPU_CAPABILITY = {
    "squeezellm": (7, 0),
    "awq": (7, 5),
    "gptq": (6, 0),
    "gptq_marlin": (8, 0),
    "fp8": (8, 9),
}


def resolve_quantization(
    requested: str | None, checkpoint: dict[str, Any] | None, model_path: str, device: DeviceConfig
) -> str | None:
    """Name of the method, or None for plain weights.

    ``checkpoint`` is the quantisation section of the model's config. What it says wins; a different
    request is an error, except where the same tensors can be read by two methods.
    """
    if requested is not None:
        requested = requested.lower()
        if requested not in registry.quantizations:
            raise ConfigError(
                f"quantization must be one of {', '.join(registry.quantizations)}, got {requested!r}",
                param="quantization",
            )
    if checkpoint is None:
        if requested in _SIDE_FILES:
            _check_side_files(requested, model_path)
        return requested
    method = str(checkpoint.get("quant_method", "")).lower()
    if method not in registry.quantizations:
        raise ConfigError(
            f"quantization: the checkpoint is quantised with {method!r}; "
            f"known: {', '.join(registry.quantizations)}",
            param="quantization",
        )
    resolved = _other_reader(requested, method, checkpoint, device)
    if resolved is None and requested not in (None, method):
        raise ConfigError(
            f"quantization is {requested!r} but the checkpoint is quantised with {method!r}; "
            "leave quantization out",
            param="quantization",
        )
    return resolved or method


def _other_reader(
    requested: str | None, method: str, checkpoint: dict[str, Any], device: DeviceConfig
) -> str | None:
    """The method that reads this checkpoint's tensors in place of the one it names, if there is one."""
    layout = checkpoint.get("checkpoint_format")
    if layout == "marlin_24":
        return "gptq_marlin_24" if requested in (None, "gptq", "gptq_marlin_24") else None
    if layout == "marlin" or checkpoint.get("is_marlin_format") is True:
        return "marlin" if requested in (None, "gptq", "marlin") else None
    if method != "gptq" or not _marlin_can_read(checkpoint, device):
        return None
    if requested == "gptq":
        logger.info("this checkpoint can be read by gptq_marlin too, which is faster")
        return None
    return "gptq_marlin" if requested in (None, "marlin", "gptq_marlin") else None


def _marlin_can_read(checkpoint: dict[str, Any], device: DeviceConfig) -> bool:
    return (
        device.capability is not None
        and device.capability >= (8, 0)
        and checkpoint.get("bits") in _MARLIN_BITS
        and checkpoint.get("group_size") in _MARLIN_GROUPS
        and checkpoint.get("sym") is True
        and "desc_act" in checkpoint
    )


def _check_side_files(method: str, model_path: str) -> None:
    names = _SIDE_FILES[method]
    found = [name for name in names if (Path(model_path) / name).is_file()]
    if len(found) != 1:
        raise ConfigError(
            f"quantization {method!r}: expected one of {', '.join(names)} in {model_path}, "
            f"found {', '.join(found) or 'none'}",
            param="quantization",
        )


def check_quantization(method: str | None, dtype: str, device: DeviceConfig) -> None:
    """Raises ConfigError if a GPU's kernels for ``method`` cannot run in ``dtype`` or on this device.

    The kernels' limits; a CPU dequantises to the run's data type and has none of them.
    """
    if method is None or device.capability is None:
        return
    dtypes = _GPU_DTYPES.get(method)
    if dtypes is not None and dtype not in dtypes:
        raise ConfigError(
            f"quantization {method!r} runs in {' or '.join(dtypes)}, not {dtype}; set dtype", param="dtype"
        )
    least = _GPU_CAPABILITY.get(method)
    if least is not None and device.capability < least:
        raise UnsupportedError(
            f"quantization {method!r} needs compute capability {least[0]}.{least[1]} and this device has "
            f"{device.capability[0]}.{device.capability[1]}",
            param="quantization",
        )
