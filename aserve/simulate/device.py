"""How long a step takes: a roofline over what the step reads, computes and exchanges.

Counts follow from the shape of a decoder with grouped-query attention and a gated MLP. With ``T`` tokens in
the step, ``S`` of which draw a next token, hidden size ``h``, ``H`` query and ``K`` key-value heads of size
``d``, MLP width ``m``, ``L`` layers, a vocabulary of ``V``:

========================  =====================================================================
weights of a layer        ``P = h*(H+2K)*d + H*d*h + 3*h*m`` (q, k, v; o; gate, up, down)
linear operations         ``2*P*L*T + 2*h*V*S`` (a multiply and an add per weight and token; the
                          head runs for drawing positions only)
weight bytes              ``(P*L + h*V) * weight_bytes``, read once per step
attention operations      ``4*H*d*L`` per (token, token it sees): half for QK', half for PV
KV bytes                  ``2*K*d*L*kv_bytes`` per token of context, read once per row, and per
                          token computed, written once
========================  =====================================================================

``starts`` and ``counts`` of a row give its pairs, ``count*start + count*(count+1)/2``, and its context,
``start + count``. The time of a kernel class is the larger of its bytes over the bandwidth and its operations
over the peak (Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009), each peak times the share of
it that is reached. Linear layers and attention run one after the other, so their times add up. The counts
are those of Kaplan et al., "Scaling Laws for Neural Language Models", 2020, section 2.1, and of Pope et al.,
"Efficiently Scaling Transformer Inference", 2022, sections 2 and 3.

With tensor parallelism over ``n`` devices each holds a share of weights, heads and KV; two all-reduces of
``T*h`` activations per layer move ``2*(n-1)/n`` of their bytes over each link (a ring, as in the NCCL tests'
PERFORMANCE.md) and cost a latency each.

Not modelled: norms, rotary embedding, sampling kernels and activation traffic (fold them into the
efficiencies and ``row_seconds`` by calibrating); layers that differ, as with sliding windows in some of
them; tile and wave quantisation; clocks and other tenants of the machine; experts, adapters, speculation.
An all-reduce never overlaps computing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aserve.errors import ConfigError
from aserve.messages.step import StepPlan

GIB = 1 << 30


@dataclass(frozen=True)
class ModelShape:
    """A decoder. weight_bytes: bytes per weight as stored (0.625 is 5 bits). kv_bytes: per cached number."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int
    max_model_len: int
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0
    tied_head: bool = False

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def stored_bytes(self) -> float:
        """Bytes of all weights in memory."""
        embeddings = self.hidden * self.vocab * (1 if self.tied_head else 2)
        return (self.layer_weights * self.layers + embeddings) * self.weight_bytes

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of keys and values of one token, all layers."""
        return 2 * self.kv_heads * self.head_size * self.layers * self.kv_bytes


@dataclass(frozen=True)
class Device:
    """One device of ``count`` equal ones, and the host that drives them.

    bandwidth: bytes/s. flops: operations/s of the linear layers at peak. The three efficiencies are the
    shares of them that kernels reach; attention has one of its own for its operations.
    step_seconds: fixed cost of a step on the device. row_seconds: per row (sequence) of a step.
    memory: bytes per device. memory_share: of it that may be used. reserved: bytes per device that hold
    neither weights nor KV. link_bandwidth: bytes/s between devices, one direction. reduce_seconds: latency
    of one all-reduce. host_seconds, host_token_seconds: what the engine's loop spends per step and per
    delivered token; hidden behind the device while steps overlap. swap_bandwidth: bytes/s between the
    device's memory and the host's.
    """

    bandwidth: float
    flops: float
    memory: float
    count: int = 1
    bandwidth_efficiency: float = 0.8
    flops_efficiency: float = 0.65
    attention_efficiency: float = 0.4
    step_seconds: float = 0.0
    row_seconds: float = 0.0
    memory_share: float = 0.9
    reserved: float = 0.0
    link_bandwidth: float = math.inf
    link_efficiency: float = 0.8
    reduce_seconds: float = 0.0
    host_seconds: float = 0.0
    host_token_seconds: float = 0.0
    swap_bandwidth: float = 25e9


@dataclass(frozen=True)
class Cost:
    """A step's seconds, by part, and what it moved and computed over all devices."""

    linear: float
    attention: float
    exchange: float
    fixed: float
    operations: float
    bytes: float

    @property
    def seconds(self) -> float:
        return self.linear + self.attention + self.exchange + self.fixed


@dataclass(frozen=True)
class Profile:
    """A model on a device."""

    name: str
    model: ModelShape
    device: Device

    def __post_init__(self) -> None:
        for part in (self.model, self.device):
            _check_figures(part)
        if self.model.kv_heads > self.model.heads or self.device.count > self.model.heads:
            raise ConfigError("heads must be at least kv_heads and the number of devices", param="device")

    def num_blocks(self, block_size: int) -> int:
        """KV blocks that memory has room for. ConfigError when the weights alone do not fit."""
        device = self.device
        usable = device.memory * device.memory_share - device.reserved
        weights = self.model.stored_bytes / device.count
        blocks = int((usable - weights) / (self.model.kv_token_bytes * self.kv_share * block_size))
        if blocks < 1:
            raise ConfigError(
                f"{self.name}: {weights / GIB:.1f} GiB of weights leave no room for KV blocks in "
                f"{usable / GIB:.1f} GiB of each device",
                param="device",
            )
        return blocks

    @property
    def kv_share(self) -> float:
        """Share of a token's KV that each device holds: with more devices than KV heads, heads repeat."""
        return max(1 / self.device.count, 1 / self.model.kv_heads)

    def step_model(self, block_size: int, window: int | None = None) -> StepModel:
        return StepModel(self, block_size, window)


class StepModel:
    """The formulas of this module with the constants of one profile worked out.

    window: tokens that a token sees, itself included; None for all before it.
    """

    def __init__(self, profile: Profile, block_size: int, window: int | None = None) -> None:
        self._window = window
        model, device = profile.model, profile.device
        share = 1 / device.count
        self._token_operations = 2 * model.layer_weights * model.layers
        self._head_operations = 2 * model.hidden * model.vocab
        self._layer_bytes = model.layer_weights * model.layers * model.weight_bytes
        self._head_bytes = model.hidden * model.vocab * model.weight_bytes
        self._pair_operations = 4 * model.heads * model.head_size * model.layers
        self._kv_bytes = model.kv_token_bytes
        self._kv_share = profile.kv_share
        self._share = share
        self._read = 1 / (device.bandwidth * device.bandwidth_efficiency)
        self._linear = 1 / (device.flops * device.flops_efficiency)
        self._attend = 1 / (device.flops * device.attention_efficiency)
        self._step = device.step_seconds
        self._row = device.row_seconds
        self._block_bytes = block_size * self._kv_bytes
        self._swap_block = self._block_bytes * share / device.swap_bandwidth
        self._exchange_step = self._exchange_token = 0.0
        if device.count > 1:
            ring = 2 * (device.count - 1) / device.count
            self._exchange_step = 2 * model.layers * device.reduce_seconds
            moved = 2 * model.layers * model.hidden * 2 * ring  # bfloat16 activations
            self._exchange_token = moved / (device.link_bandwidth * device.link_efficiency)

    def cost(
        self,
        tokens: int,
        samples: int,
        pairs: float,
        context: int,
        rows: int,
        copied: int = 0,
        swapped: int = 0,
    ) -> Cost:
        """Seconds of a step.

        tokens: computed. samples: positions that draw. pairs: (token, token it sees). context: tokens whose
        KV is read, each row's once. copied, swapped: KV blocks copied on the device, moved from or to the
        host.
        """
        operations = self._token_operations * tokens + self._head_operations * samples
        weights = self._layer_bytes + (self._head_bytes if samples else 0.0)
        linear = self._share * max(weights * self._read, operations * self._linear)
        attend = self._pair_operations * pairs
        kv = self._kv_bytes * (context + tokens) + 2 * self._block_bytes * copied
        attention = max(kv * self._kv_share * self._read, attend * self._share * self._attend)
        exchange = self._exchange_step + self._exchange_token * tokens if self._exchange_step else 0.0
        fixed = self._step + self._row * rows + self._swap_block * swapped
        return Cost(linear, attention, exchange, fixed, operations + attend, weights + kv)

    def of_plan(self, plan: StepPlan) -> Cost:
        """The cost of what the scheduler decided."""
        starts, counts = plan.starts, plan.counts
        tokens = sum(counts)
        before = sum(starts)
        if self._window is None:
            # A decode's one token sees `start + 1`; only prefill rows need more than the two sums.
            context, pairs = before + tokens, float(before + len(starts))
            for row in range(plan.num_prefill_rows):
                count = counts[row]
                pairs += (count - 1) * (starts[row] + 1) + count * (count - 1) / 2
        else:
            context, pairs = _windowed(starts, counts, self._window)
        swapped = len(plan.swap_ins) + len(plan.swap_outs)
        return self.cost(
            tokens, len(plan.samples), pairs, context, len(starts), len(plan.block_copies), swapped
        )


def _windowed(starts: list[int], counts: list[int], window: int) -> tuple[int, float]:
    """Tokens whose KV is read, and pairs, where a token sees no more than ``window``."""
    context, pairs = 0, 0.0
    for start, count in zip(starts, counts, strict=True):
        context += min(start + count, window + count - 1)
        # Tokens that see everything before them come first, then those that see a whole window.
        whole = min(count, max(0, window - start - 1))
        pairs += whole * (start + 1) + whole * (whole - 1) / 2 + (count - whole) * window
    return context, pairs


def _check_figures(part: ModelShape | Device) -> None:
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, bool):
            continue
        zero = field.name in ("reserved",) or field.name.endswith("_seconds")
        if not (value > 0 or (zero and value == 0)):
            raise ConfigError(f"{field.name} must be above 0, got {value}", param=field.name)
        if field.name.endswith(("_efficiency", "_share")) and value > 1:
            raise ConfigError(f"{field.name} must be at most 1, got {value}", param=field.name)


LLAMA_3_8B = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, 8192)
LLAMA_3_70B = ModelShape(80, 8192, 64, 8, 128, 28672, 128256, 8192)
SMOLLM2_135M = ModelShape(30, 576, 9, 3, 64, 1536, 49152, 8192, weight_bytes=0.625, tied_head=True)

# NVIDIA's H100 SXM data sheet: 3.35 TB/s, 989 TFLOP/s bfloat16 dense, 80 GB, NVLink 450 GB/s each way. The
# efficiencies, latencies and host times are assumptions of the usual size, to be replaced by calibration.
_H100 = Device(
    bandwidth=3.35e12,
    flops=989e12,
    memory=80e9,
    step_seconds=0.3e-3,
    reserved=4e9,
    link_bandwidth=450e9,
    reduce_seconds=8e-6,
    host_seconds=0.3e-3,
    host_token_seconds=20e-6,
)

PRESETS = {
    "h100-8b": Profile("h100-8b", LLAMA_3_8B, _H100),
    "h100x4-70b": Profile("h100x4-70b", LLAMA_3_70B, dataclasses.replace(_H100, count=4)),
    "cpu-smollm2": Profile(
        "cpu-smollm2",
        SMOLLM2_135M,
        # Two cores with AVX-512 VNNI: reads and int8 products as `aserve bench limits` measures them.
        Device(
            bandwidth=34e9,
            flops=1438e9,
            memory=4 * GIB + SMOLLM2_135M.stored_bytes,
            memory_share=1.0,
            flops_efficiency=0.3,
            attention_efficiency=0.15,
            step_seconds=0.5e-3,
            host_seconds=0.2e-3,
            host_token_seconds=25e-6,
            swap_bandwidth=15e9,
        ),
    ),
}


def load_profile(name: str) -> Profile:
    """A preset by name, or a JSON file as :func:`as_json` writes it. ConfigError when it is neither."""
    if name in PRESETS:
        return PRESETS[name]
    try:
        value = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(
            f"{name!r} is neither a file nor one of {', '.join(PRESETS)}", param="device"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{name}: {error}", param="device") from None
    if not isinstance(value, dict) or not {"model", "device"} <= value.keys():
        raise ConfigError(f'{name}: expected an object with "model" and "device"', param="device")
    return Profile(
        str(value.get("name", name)),
        _from_json(ModelShape, value["model"], name),
        _from_json(Device, value["device"], name),
    )


def as_json(profile: Profile) -> dict[str, Any]:
    """What :func:`load_profile` reads; a link that no figure is given for is left out."""
    value = dataclasses.asdict(profile)
    if value["device"]["link_bandwidth"] == math.inf:
        del value["device"]["link_bandwidth"]
    return value


def _from_json(cls: type[Any], value: Any, name: str) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(value, dict) or not value.keys() <= known:
        wrong = sorted(value.keys() - known) if isinstance(value, dict) else value
        raise ConfigError(f"{name}: {cls.__name__} has no {wrong}; it has {sorted(known)}", param="device")
    for key, each in value.items():
        if not isinstance(each, bool if key == "tied_head" else (int, float)):
            raise ConfigError(f"{name}: {key} must be a number, got {each!r}", param=key)
    try:
        return cls(**value)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}", param="device") from None
