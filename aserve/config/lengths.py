"""How long a sequence may be: from the model's config, its rope scaling and the user's word."""

from __future__ import annotations

import logging
from typing import Any

from aserve.errors import ConfigError

logger = logging.getLogger(__name__)

LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Config keys that bound the context length; the smallest one present counts."""

ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "su": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Rope scaling types and the keys each of them needs."""

_LISTS = ("short_factor", "long_factor")
_STRETCHING = ("linear", "dynamic", "yarn")
_FALLBACK_LEN = 2048


def rope_type(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def check_rope(rope: dict[str, Any], name: str = "rope_scaling") -> None:
    """Raises ConfigError unless ``rope`` has a known type and the numbers that type needs."""
    first, second = rope.get("rope_type"), rope.get("type")
    if first and second and first != second:
        raise ConfigError(f"{name} has rope_type {first!r} and type {second!r}; give one", param=name)
    kind = rope_type(rope)
    if kind not in ROPE_TYPES:
        raise ConfigError(f"{name}: unknown type {kind!r}; known: {', '.join(ROPE_TYPES)}", param=name)
    for key in ROPE_TYPES[kind]:
        if key not in rope:
            raise ConfigError(f"{name}: type {kind!r} needs {key!r}", param=name)
        numbers = rope[key] if key in _LISTS else [rope[key]]
        if not isinstance(numbers, list) or not all(_positive(number) for number in numbers):
            wanted = "a list of numbers" if key in _LISTS else "a number"
            raise ConfigError(f"{name}: {key!r} must be {wanted} above 0, got {rope[key]!r}", param=name)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _own_rope(config: Any) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return rope if isinstance(rope, dict) else {}


def _per_layer_type(rope: dict[str, Any]) -> bool:
    return bool(rope) and all(isinstance(value, dict) for value in rope.values())


def apply_rope_scaling(config: Any, override: dict[str, Any]) -> None:
    """Puts ``override`` in place of the config's own scaling and keeps its base frequency.

    A config with parameters per layer type has it applied to full attention alone: sliding windows see
    no long distances.
    """
    check_rope(override)
    scaling = {key: value for key, value in override.items() if key != "type"}
    scaling["rope_type"] = rope_type(override)
    own = _own_rope(config)
    if _per_layer_type(own):
        theta = own.get("full_attention", {}).get("rope_theta")
        replaced: dict[str, Any] = {**own, "full_attention": _with_theta(scaling, theta)}
    elif own or hasattr(config, "rope_theta"):
        replaced = _with_theta(scaling, own.get("rope_theta", getattr(config, "rope_theta", None)))
    else:
        raise ConfigError("rope_scaling: this model has no rotary embeddings", param="rope_scaling")
    config.rope_parameters = replaced


def _with_theta(scaling: dict[str, Any], theta: float | None) -> dict[str, Any]:
    return scaling if theta is None else {"rope_theta": theta, **scaling}


def derived_max_len(config: Any) -> tuple[int, str] | None:
    """Longest sequence the config allows and the key that says so; None if no key does.

    Scaled ropes stretch it by their factor, yarn from the length the model was first trained on. The
    types su, longrope and llama3 do not, nor do parameters per layer type: there the config states the
    stretched length itself.
    """
    stated: list[tuple[Any, str]] = [(getattr(config, key, None), key) for key in LENGTH_KEYS]
    found = [(value, key) for value, key in stated if _positive(value)]
    if not found:
        return None
    length, key = min(found)
    rope = _own_rope(config)
    if _per_layer_type(rope):
        for part in rope.values():
            check_rope(_complete(part, config), "the model's rope parameters")
        return int(length), key
    rope = _complete(rope, config)
    check_rope(rope, "the model's rope parameters")
    if rope_type(rope) in _STRETCHING:
        if rope_type(rope) == "yarn":
            length, key = rope["original_max_position_embeddings"], "original_max_position_embeddings"
        return int(length * rope["factor"]), f"{key} x rope factor {rope['factor']}"
    return int(length), key


def _complete(rope: dict[str, Any], config: Any) -> dict[str, Any]:
    """Some configs state the original length beside the rope parameters instead of in them."""
    original = getattr(config, "original_max_position_embeddings", None)
    if original is None:
        return rope
    return {"original_max_position_embeddings": original, **rope}


def resolve_max_model_len(requested: int | None, config: Any) -> int:
    """Context length to serve, in tokens.

    ``requested`` may exceed the derived length only up to a ``model_max_length`` the config states.
    """
    if requested is not None and requested < 1:
        raise ConfigError(f"max_model_len must be at least 1, got {requested}", param="max_model_len")
    derived = derived_max_len(config)
    if derived is None:
        if requested is None:
            logger.warning("the model config states no maximum length: assuming %d tokens", _FALLBACK_LEN)
        return requested or _FALLBACK_LEN
    length, source = derived
    if requested is None:
        return length
    if requested > length and requested > (getattr(config, "model_max_length", None) or 0):
        raise ConfigError(
            f"max_model_len ({requested}) is more than the {length} tokens the model allows "
            f"({source} in its config)",
            param="max_model_len",
        )
    return requested
