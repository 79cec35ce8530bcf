"""How KV cache memory is laid out and how much there is."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aserve.config.memory import total_memory_bytes
from aserve.config.model import ModelConfig
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from aserve.args import EngineArgs

logger = logging.getLogger(__name__)

BLOCK_SIZES = (8, 16, 32)
CACHE_DTYPES = ("auto", "fp8", "fp8_e5m2", "fp8_e4m3")
CPU_KVCACHE_VARIABLES = ("ASERVE_CPU_KVCACHE_SPACE", "VLLM_CPU_KVCACHE_SPACE")

_GIB = 1 << 30
_DEFAULT_SWAP_GIB = 4
DEFAULT_SWAP_BYTES = _DEFAULT_SWAP_GIB * _GIB


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache.

    block_size: tokens per block. gpu_memory_utilization: fraction of a GPU's memory, in (0, 1].
    swap_space_bytes: host memory per GPU that may hold swapped blocks. cache_dtype: "auto" is the
    model's. num_gpu_blocks_override: blocks, in place of what memory allows. cpu_kvcache_bytes: size
    of the cache when the device is a CPU; None for what memory allows.
    """

    block_size: int
    gpu_memory_utilization: float
    swap_space_bytes: int
    cache_dtype: str
    num_gpu_blocks_override: int | None
    enable_prefix_caching: bool
    quantization_param_path: str | None
    cpu_kvcache_bytes: int | None


def resolve_cache_config(args: EngineArgs, model: ModelConfig) -> CacheConfig:
    if args.block_size < 1:
        raise ConfigError(f"block_size must be at least 1, got {args.block_size}", param="block_size")
    if not 0.0 < args.gpu_memory_utilization <= 1.0:
        raise ConfigError(
            f"gpu_memory_utilization must be above 0 and at most 1, got {args.gpu_memory_utilization}",
            param="gpu_memory_utilization",
        )
    if args.kv_cache_dtype not in CACHE_DTYPES:
        raise ConfigError(
            f"kv_cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {args.kv_cache_dtype!r}",
            param="kv_cache_dtype",
        )
    if args.kv_cache_dtype == "fp8_e5m2" and model.quantization == "fp8":
        raise ConfigError(
            "kv_cache_dtype fp8_e5m2 does not go with an fp8 checkpoint; use fp8", param="kv_cache_dtype"
        )
    if args.enable_prefix_caching and model.uniform_window is not None:
        raise ConfigError(
            "enable_prefix_caching does not go with a model all of whose layers have a sliding window: "
            "what leaves the window is not kept",
            param="enable_prefix_caching",
        )
    caching = args.enable_prefix_caching
    if caching is None:
        caching = model.uniform_window is None
    _check_swap_space(args)
    _check_block_override(args, model)
    return CacheConfig(
        block_size=args.block_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        swap_space_bytes=args.swap_space * _GIB,
        cache_dtype=args.kv_cache_dtype,
        num_gpu_blocks_override=args.num_gpu_blocks_override,
        enable_prefix_caching=caching,
        quantization_param_path=args.quantization_param_path,
        cpu_kvcache_bytes=cpu_kvcache_bytes(),
    )


def _check_swap_space(args: EngineArgs) -> None:
    if args.swap_space < 0:
        raise ConfigError(f"swap_space must be 0 GiB or more, got {args.swap_space}", param="swap_space")
    if args.swap_space == _DEFAULT_SWAP_GIB:
        # Nobody asked for it: a small machine must not be refused for it, but takes less.
        return
    asked = args.swap_space * args.tensor_parallel_size * _GIB
    host = total_memory_bytes()
    if asked > 0.7 * host:
        raise ConfigError(
            f"swap_space: {asked / _GIB:.1f} GiB of swap space is more than 70% of this "
            f"machine's {host / _GIB:.1f} GiB of memory",
            param="swap_space",
        )
    if asked > 0.4 * host:
        logger.warning(
            "swap space takes %.1f GiB of this machine's %.1f GiB of memory", asked / _GIB, host / _GIB
        )


def _check_block_override(args: EngineArgs, model: ModelConfig) -> None:
    blocks = args.num_gpu_blocks_override
    if blocks is None:
        return
    if blocks < 1:
        raise ConfigError(
            f"num_gpu_blocks_override must be at least 1, got {blocks}", param="num_gpu_blocks_override"
        )
    if blocks * args.block_size < model.max_model_len:
        raise ConfigError(
            f"num_gpu_blocks_override: {blocks} blocks of {args.block_size} tokens cannot hold a sequence of "
            f"max_model_len ({model.max_model_len}) tokens; allow "
            f"{math.ceil(model.max_model_len / args.block_size)} blocks or lower max_model_len",
            param="num_gpu_blocks_override",
        )


def cpu_kvcache_bytes() -> int | None:
    """KV cache size on a CPU, from the environment in GiB; None if it is 0 or unset."""
    for variable in CPU_KVCACHE_VARIABLES:
        text = os.environ.get(variable, "")
        if not text:
            continue
        try:
            gib = float(text)
        except ValueError:
            gib = math.nan
        if not 0 <= gib < math.inf:
            raise ConfigError(f"{variable} must be a number of GiB, 0 or more, got {text!r}", param=variable)
        if gib > 0:
            return int(gib * _GIB)
        break
    return None
