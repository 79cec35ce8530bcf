"""Rotary position embeddings and their context-extension schemes.

A table of cosines and sines is built once for every position the engine admits. Schemes whose
frequencies depend on the sequence length (dynamic NTK, LongRoPE) therefore take it to be
``max_model_len``: keys in the cache are already rotated and cannot follow a length that grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from aserve.errors import ConfigError

Parameters = Mapping[str, Any]


@dataclass(slots=True)
class Rotary:
    """cos_sin: float32 ``[max_model_len, R]``, see :func:`aserve.ops.rope_and_store`."""

    cos_sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class RotaryShape:
    """dim: rotated features of a head. max_position: what the model was configured for, in tokens."""

    dim: int
    theta: float
    max_position: int
    max_model_len: int


def rope_parameters(
    hf_config: Any, override: Parameters | None = None, layer_type: str | None = None
) -> dict[str, Any]:
    """One flat dict with ``rope_type``, ``rope_theta`` and the scheme's own keys.

    Reads both forms of configuration: ``rope_parameters`` (transformers 5, per layer type where a model
    has several) and ``rope_theta`` with ``rope_scaling`` (transformers 4). ``override`` replaces the
    scaling as a whole and keeps the base.
    """
    found = getattr(hf_config, "rope_parameters", None) or {}
    if layer_type is not None and layer_type in found:
        found = found[layer_type] or {}
    scaling = getattr(hf_config, "rope_scaling", None)
    merged = dict(found) if found else dict(scaling or {})
    theta: float = merged.get("rope_theta") or getattr(hf_config, "rope_theta", None) or 10000.0
    partial = merged.get("partial_rotary_factor", getattr(hf_config, "partial_rotary_factor", None))
    if override is not None:
        merged = dict(override)
    merged["rope_type"] = merged.get("rope_type", merged.get("type", "default"))
    merged["rope_theta"] = float(merged.get("rope_theta", theta))
    merged["partial_rotary_factor"] = 1.0 if partial is None else float(partial)
    original = getattr(hf_config, "original_max_position_embeddings", None)
    if original is not None:
        merged.setdefault("original_max_position_embeddings", original)
    return merged


def make_rotary(
    parameters: Parameters,
    *,
    head_size: int,
    max_position: int,
    max_model_len: int,
    device: torch.device,
) -> Rotary:
    """Builds the table of ``parameters`` (as :func:`rope_parameters` returns them).

    ConfigError: unknown ``rope_type``, or a key of the scheme is missing.
    """
    kind = parameters["rope_type"]
    scheme = _SCHEMES.get(kind)
    if scheme is None:
        known = ", ".join(sorted(_SCHEMES))
        raise ConfigError(f"unknown rope scaling type {kind!r}; known: {known}")
    dim = int(head_size * parameters.get("partial_rotary_factor", 1.0))
    shape = RotaryShape(dim, parameters["rope_theta"], max_position, max_model_len)
    try:
        inv_freq, magnitude = scheme(parameters, shape)
    except KeyError as error:
        raise ConfigError(f"rope scaling of type {kind!r} needs the key {error.args[0]!r}") from None
    angles = torch.arange(max_model_len, dtype=torch.float32).unsqueeze(1) * inv_freq
    cos_sin = torch.cat((angles.cos() * magnitude, angles.sin() * magnitude), dim=-1)
    return Rotary(cos_sin.to(device))


def _exponents(dim: int) -> torch.Tensor:
    return torch.arange(0, dim, 2, dtype=torch.int64).float() / dim


def _default(parameters: Parameters, shape: RotaryShape) -> tuple[torch.Tensor, float]:
    return 1.0 / (shape.theta ** _exponents(shape.dim)), 1.0


def _linear(parameters: Parameters, shape: RotaryShape) -> tuple[torch.Tensor, float]:
    """Position interpolation (Chen et al. 2023)."""
    inv_freq, magnitude = _default(parameters, shape)
    return inv_freq / parameters["factor"], magnitude


def _dynamic(parameters: Parameters, shape: RotaryShape) -> tuple[torch.Tensor, float]:
    """NTK-aware scaling with the base for sequences of ``max_model_len``; plain up to ``max_position``."""
    factor, dim = parameters["factor"], shape.dim
    ratio = max(shape.max_model_len, shape.max_position) / shape.max_position
    base = shape.theta * (factor * ratio - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / (base ** _exponents(dim)), 1.0


def _yarn(parameters: Parameters, shape: RotaryShape) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023): high frequencies kept, low ones interpolated, a ramp between."""
    original = parameters["original_max_position_embeddings"]
    factor = parameters["factor"] or shape.max_position / original
    low, high = (
        shape.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(shape.theta))
        for turns in (parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1)
    )
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, shape.dim - 1)
    if low == high:
        high += 0.001  # keeps the ramp finite
    ramp = ((torch.arange(shape.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = (1 - ramp) * parameters.get("extrapolation_factor", 1.0)
    frequencies = shape.theta ** _exponents(shape.dim)
    inv_freq = 1.0 / (factor * frequencies) * (1 - keep) + 1.0 / frequencies * keep
    return inv_freq, _yarn_magnitude(parameters, factor)


def _yarn_magnitude(parameters: Parameters, factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weight, over = parameters.get("mscale"), parameters.get("mscale_all_dim")
    result = magnitude(weight) / magnitude(over) if weight and over else magnitude(1.0)
    return result * float(parameters.get("attn_factor", 1.0))


def _longrope(parameters: Parameters, shape: RotaryShape) -> tuple[torch.Tensor, float]:
    """LongRoPE (Ding et al. 2024): one divisor per frequency, another set past the original length."""
    original = parameters["original_max_position_embeddings"]
    is_long = shape.max_model_len > original
    divisors = torch.tensor(parameters["long_factor" if is_long else "short_factor"], dtype=torch.float32)
    if len(divisors) != shape.dim // 2:
        raise ConfigError(
            f"rope scaling has {len(divisors)} factors; this model has {shape.dim // 2} frequencies"
        )
    inv_freq = 1.0 / (divisors * shape.theta ** _exponents(shape.dim))
    given = parameters.get("long_mscale" if is_long else "short_mscale", parameters.get("attention_factor"))
    if given is not None:
        return inv_freq, float(given)
    factor = parameters.get("factor") or shape.max_position / original
    return inv_freq, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _su(parameters: Parameters, shape: RotaryShape) -> tuple[torch.Tensor, float]:
    """LongRoPE under its first name, whose magnitudes were constants."""
    return _longrope({"short_mscale": 1.1, "long_mscale": 1.225, **parameters}, shape)


def _llama3(parameters: Parameters, shape: RotaryShape) -> tuple[torch.Tensor, float]:
    """Llama 3.1: wavelengths past the original context interpolated, short ones kept, a ramp between."""
    inv_freq, magnitude = _default(parameters, shape)
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = original * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inv_freq / factor + keep * inv_freq, magnitude


_SCHEMES: dict[str, Callable[[Parameters, RotaryShape], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "su": _su,
    "yarn": _yarn,
}
