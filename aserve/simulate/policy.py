"""What can be chosen: the scheduler's limits, whatever they are, and what the engine adds around them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from dataclasses import dataclass
from typing import Any

from aserve.config.scheduler import OVERLAPS, PREEMPTION_MODES
from aserve.core.scheduler import SchedulerLimits
from aserve.errors import ConfigError
from aserve.simulate.device import Profile

ENGINE_NAMES = {
    "num_blocks": "num_gpu_blocks_override",
    "chunked_prefill": "enable_chunked_prefill",
    "prefix_caching": "enable_prefix_caching",
    "delay_factor": "scheduler_delay_factor",
}
"""Limits whose flag of ``aserve serve`` is called otherwise; both names are understood."""

DEFAULTS: dict[str, Any] = {"block_size": 16, "max_num_seqs": 256, "chunked_prefill": True}
_CHUNKED_TOKENS = 512
_LEAST_TOKENS = 2048


@dataclass(frozen=True)
class Serving:
    """What the engine decides outside its scheduler.

    overlap: steps issued before the previous one's result is read, 0 or 1.
    timeout: seconds after which an unfinished request is aborted.
    """

    overlap: int = 1
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.overlap not in OVERLAPS:
            raise ConfigError(f"overlap must be 0 or 1, got {self.overlap}", param="overlap")
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError(f"timeout must be above 0, got {self.timeout}", param="timeout")


@dataclass(frozen=True)
class Option:
    """One choice. kind: bool, int, float or str. default: None where it depends on other choices."""

    name: str
    kind: type
    optional: bool
    default: Any
    help: str

    def parse(self, text: str) -> Any:
        """The value that ``text`` spells; ConfigError otherwise."""
        if self.optional and text.lower() == "none":
            return None
        if self.kind is bool:
            words = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
            if text.lower() not in words:
                raise ConfigError(f"{self.name} is on or off, got {text!r}", param=self.name)
            return words[text.lower()]
        try:
            return self.kind(text)
        except ValueError:
            raise ConfigError(
                f"{self.name}: expected {self.kind.__name__}, got {text!r}", param=self.name
            ) from None


def options() -> dict[str, Option]:
    """Every choice by name: the fields of :class:`SchedulerLimits`, whatever they are, then Serving's."""
    found: dict[str, Option] = {}
    for cls in (SchedulerLimits, Serving):
        hints = typing.get_type_hints(cls)
        documented = _documented(cls)
        for field in dataclasses.fields(cls):
            kind, optional = _kind(hints[field.name])
            if kind is None or field.name in found:
                continue
            default = None if field.default is dataclasses.MISSING else field.default
            default = DEFAULTS.get(field.name, default)
            found[field.name] = Option(field.name, kind, optional, default, documented.get(field.name, ""))
    return found


def parse_choice(text: str) -> tuple[Option, list[Any]]:
    """``name=value,value`` as the option and its values; ConfigError for anything else."""
    name, separator, values = text.partition("=")
    option = options().get(canonical(name))
    if option is None or not separator or not values:
        raise ConfigError(
            f"expected NAME=VALUE,... with NAME one of {', '.join(options())}, got {text!r}", param="compare"
        )
    return option, [option.parse(value) for value in values.split(",")]


def canonical(name: str) -> str:
    """The limit's own name for a name from either side, dashes or underscores."""
    name = name.strip().replace("-", "_")
    return {flag: limit for limit, flag in ENGINE_NAMES.items()}.get(name, name)


def resolve(chosen: dict[str, Any], profile: Profile) -> tuple[SchedulerLimits, Serving]:
    """The limits that the choices come to on this device; what is not chosen has its default.

    Unset, ``num_blocks`` is what memory has room for and ``max_num_batched_tokens`` what the engine takes:
    512 with chunked prefill, else the context length, at least 2048; never below ``max_num_seqs``.
    """
    values = {name: option.default for name, option in options().items()} | chosen
    if values["block_size"] < 1 or values["max_num_seqs"] < 1:
        raise ConfigError("block_size and max_num_seqs must be at least 1", param="max_num_seqs")
    longest = profile.model.max_model_len
    if values["num_blocks"] is None:
        values["num_blocks"] = profile.num_blocks(values["block_size"])
    if values["max_num_batched_tokens"] is None:
        least = _CHUNKED_TOKENS if values["chunked_prefill"] else max(longest, _LEAST_TOKENS)
        values["max_num_batched_tokens"] = max(least, values["max_num_seqs"])
    if values["max_num_batched_tokens"] < values["max_num_seqs"]:
        raise ConfigError(
            f"max_num_batched_tokens ({values['max_num_batched_tokens']}) is less than max_num_seqs "
            f"({values['max_num_seqs']})",
            param="max_num_batched_tokens",
        )
    if not values["chunked_prefill"] and values["max_num_batched_tokens"] < longest:
        raise ConfigError(
            f"max_num_batched_tokens ({values['max_num_batched_tokens']}) is less than max_model_len "
            f"({longest}): without chunked prefill the engine refuses it",
            param="max_num_batched_tokens",
        )
    _check(values)
    limits = {field.name for field in dataclasses.fields(SchedulerLimits)}
    around = {name: value for name, value in values.items() if name not in limits}
    return _fill(SchedulerLimits, values), _fill(Serving, around)


def _check(values: dict[str, Any]) -> None:
    """Refuses what the scheduler has no use for, as the engine does before it makes one."""
    least = {"num_blocks": 1, "max_waiting_requests": 1, "max_waiting_tokens": 1}
    least |= {"delay_factor": 0, "num_swap_blocks": 0, "num_lookahead_slots": 0, "window": 1}
    for name, bound in least.items():
        if values[name] is not None and not values[name] >= bound:
            raise ConfigError(f"{name} must be at least {bound}, got {values[name]}", param=name)
    mode = values["preemption_mode"]
    if mode not in (None, *PREEMPTION_MODES):
        raise ConfigError(
            f"preemption_mode must be one of {', '.join(PREEMPTION_MODES)}, got {mode!r}",
            param="preemption_mode",
        )
    if mode == "swap" and not values["num_swap_blocks"]:
        raise ConfigError("preemption_mode swap needs num_swap_blocks above 0", param="preemption_mode")
    if values["prefix_caching"] and values["window"] is not None:
        raise ConfigError("prefix_caching does not go with a window", param="prefix_caching")


def _fill(cls: type[Any], values: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


def _kind(hint: Any) -> tuple[type | None, bool]:
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = [member for member in members if member is not type(None)]
    simple = len(plain) == 1 and plain[0] in (bool, int, float, str)
    return (plain[0] if simple else None), len(plain) < len(members)


def _documented(cls: type[Any]) -> dict[str, str]:
    """The ``name: text`` and ``name, name: text`` entries of a docstring."""
    name = "(?:" + "|".join(field.name for field in dataclasses.fields(cls)) + ")"
    parts = re.split(
        rf"(?:^|(?<=[.;])\s+)({name}(?:, {name})*): ", inspect.getdoc(cls) or "", flags=re.MULTILINE
    )
    return {
        each: " ".join(entry.split("\n\n")[0].split())
        for names, entry in zip(parts[1::2], parts[2::2], strict=True)
        for each in names.split(", ")
    }
