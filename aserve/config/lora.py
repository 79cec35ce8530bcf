"""Limits on LoRA adapters."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aserve.config.model import ModelConfig
from aserve.config.scheduler import SchedulerConfig
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from aserve.args import EngineArgs

logger = logging.getLogger(__name__)

LORA_DTYPES = ("auto", "float16", "bfloat16", "float32")
MAX_LORA_RANKS = (8, 16, 32, 64)
EXTRA_VOCAB_SIZES = (0, 256, 512)

_MOST_BATCHED_TOKENS = 65528
_QUIET_QUANTIZATIONS = (None, "awq", "gptq")


@dataclass(frozen=True)
class LoRAConfig:
    """``lora_dtype`` is a resolved name; ``max_cpu_loras`` is at least ``max_loras``."""

    max_lora_rank: int
    max_loras: int
    fully_sharded_loras: bool
    max_cpu_loras: int
    lora_dtype: str
    lora_extra_vocab_size: int
    long_lora_scaling_factors: tuple[float, ...] | None


def resolve_lora_config(
    args: EngineArgs, model: ModelConfig, scheduler: SchedulerConfig
) -> LoRAConfig | None:
    """None unless LoRA is enabled."""
    if not args.enable_lora:
        return None
    if args.max_lora_rank not in MAX_LORA_RANKS:
        raise ConfigError(
            f"max_lora_rank must be one of {_listed(MAX_LORA_RANKS)}, got {args.max_lora_rank}",
            param="max_lora_rank",
        )
    if args.lora_extra_vocab_size not in EXTRA_VOCAB_SIZES:
        raise ConfigError(
            f"lora_extra_vocab_size must be one of {_listed(EXTRA_VOCAB_SIZES)}, "
            f"got {args.lora_extra_vocab_size}",
            param="lora_extra_vocab_size",
        )
    if args.max_loras < 1:
        raise ConfigError(f"max_loras must be at least 1, got {args.max_loras}", param="max_loras")
    if args.lora_dtype not in LORA_DTYPES:
        raise ConfigError(
            f"lora_dtype must be one of {_listed(LORA_DTYPES)}, got {args.lora_dtype!r}", param="lora_dtype"
        )
    max_cpu_loras = args.max_cpu_loras
    if max_cpu_loras is None or max_cpu_loras <= 0:
        max_cpu_loras = args.max_loras
    if max_cpu_loras < args.max_loras:
        raise ConfigError(
            f"max_cpu_loras ({max_cpu_loras}) is less than max_loras ({args.max_loras})",
            param="max_cpu_loras",
        )
    factors = args.long_lora_scaling_factors
    if factors is not None and any(factor <= 0 for factor in factors):
        raise ConfigError(
            f"long_lora_scaling_factors must be above 0, got {factors}", param="long_lora_scaling_factors"
        )
    if scheduler.max_num_batched_tokens > _MOST_BATCHED_TOKENS:
        raise ConfigError(
            f"max_num_batched_tokens must be at most {_MOST_BATCHED_TOKENS} with enable_lora, "
            f"got {scheduler.max_num_batched_tokens}",
            param="max_num_batched_tokens",
        )
    if model.quantization not in _QUIET_QUANTIZATIONS:
        logger.warning("LoRA over %s weights has not been checked", model.quantization)
    return LoRAConfig(
        max_lora_rank=args.max_lora_rank,
        max_loras=args.max_loras,
        fully_sharded_loras=args.fully_sharded_loras,
        max_cpu_loras=max_cpu_loras,
        lora_dtype=model.dtype if args.lora_dtype == "auto" else args.lora_dtype,
        lora_extra_vocab_size=args.lora_extra_vocab_size,
        long_lora_scaling_factors=factors,
    )


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values)
