"""Where the model runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
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
        raise UnsupportedError(_about_neuron(), param="device")
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


def _about_neuron() -> str:
    if find_spec("torch_neuronx") is None:
        return "device 'neuron' needs the package torch_neuronx, which is not here; use 'cpu' or 'cuda'"
    return (
        "device 'neuron': torch_neuronx is installed, but this release has no paged KV cache and no "
        "attention for Neuron cores, so no request could be served; use 'cpu' or 'cuda'"
    )
