"""The data type of weights and activations, as a name."""

from __future__ import annotations

import logging
from typing import Any

from aserve.config.device import DeviceConfig
from aserve.errors import ConfigError, UnsupportedError

logger = logging.getLogger(__name__)

DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
_LONG_NAMES = {"half": "float16", "float": "float32"}
_RUNNABLE = ("float32", "float16", "bfloat16")


def dtype_name(value: Any) -> str | None:
    """Name of a torch dtype or of its spelling in a config file; None stays None."""
    return None if value is None else str(value).removeprefix("torch.")


def resolve_dtype(requested: str, checkpoint: str | None, device: DeviceConfig) -> str:
    """The data type to run in: "float32", "float16" or "bfloat16".

    ``checkpoint`` is the data type named by the model's config; a config that names none counts as
    float32. ``auto`` runs float32 checkpoints in float16. A CPU runs bfloat16 instead of float16.
    """
    lowered = requested.lower()
    if lowered not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {requested!r}", param="dtype")
    stored = checkpoint or "float32"
    if lowered == "auto":
        if stored not in _RUNNABLE:
            raise ConfigError(
                f"dtype: the model's data type is {stored}, which cannot be run in; "
                f"choose one of {', '.join(_RUNNABLE)}",
                param="dtype",
            )
        chosen = "float16" if stored == "float32" else stored
    else:
        chosen = _LONG_NAMES.get(lowered, lowered)
        if {chosen, stored} == {"float16", "bfloat16"}:
            logger.warning("casting a %s model to %s", stored, chosen)
    if device.device == "cpu" and chosen == "float16":
        if lowered != "auto":
            logger.warning("float16 is not run on a CPU: using bfloat16 instead")
        chosen = "bfloat16"
    capability = device.capability
    if chosen == "bfloat16" and capability is not None and capability < (8, 0):
        raise UnsupportedError(
            "dtype bfloat16 needs compute capability 8.0 and this device has "
            f"{capability[0]}.{capability[1]}; use dtype='half'",
            param="dtype",
        )
    return chosen
