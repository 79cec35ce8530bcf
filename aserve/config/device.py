"""Where the model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aserve.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from aserve.args import EngineArgs

DEVICES = ("auto", "cuda", "neuron", "cpu")


@dataclass(frozen=True)
class DeviceConfig:
    """``device`` is "cpu" or "cuda"; ``capability`` a CUDA device's compute capability, as (8, 0)."""

    device: str
    capability: tuple[int, int] | None = None
    num_devices: int = 1


def resolve_device_config(args: EngineArgs) -> DeviceConfig:
    device = args.device
    if device not in DEVICES:
        raise ConfigError(f"device must be one of {', '.join(DEVICES)}, got {device!r}", param="device")
    if device == "neuron":
        raise UnsupportedError(
            "device 'neuron' is not built in this release; use 'cpu' or 'cuda'", param="device"
        )
    if device == "cpu":
        return DeviceConfig("cpu")

    import torch

    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        return DeviceConfig("cuda", (capability[0], capability[1]), torch.cuda.device_count())
    if device == "cuda":
        raise UnsupportedError(
            "device 'cuda' needs a CUDA device, and torch finds none here; use 'cpu'", param="device"
        )
    return DeviceConfig("cpu")
