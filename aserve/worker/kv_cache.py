"""How many KV blocks there is memory for, and the tensors that hold them."""

from __future__ import annotations

import logging
import math

import torch

from aserve import ops
from aserve.attention.base import KVCache
from aserve.config.cache import DEFAULT_SWAP_BYTES
from aserve.config.engine import EngineConfig
from aserve.config.memory import available_memory_bytes
from aserve.errors import ConfigError
from aserve.ops.memory import huge_pages

logger = logging.getLogger(__name__)

_GIB = 1 << 30


def bytes_per_block(shapes: list[tuple[int, int]], block_size: int, dtype: torch.dtype) -> int:
    """shapes: ``(num_kv_heads, head_size)`` of each layer."""
    return sum(2 * block_size * heads * size for heads, size in shapes) * dtype.itemsize


def count_blocks(config: EngineConfig, block_bytes: int) -> int:
    """Blocks that fit the host memory the configuration grants; ConfigError if too few to be of use."""
    cache, max_model_len = config.cache, config.model.max_model_len
    advice = "raise ASERVE_CPU_KVCACHE_SPACE (GiB)"
    num_blocks = min(max(0, _cpu_bytes(config) // block_bytes), useful_blocks(config))
    if cache.num_gpu_blocks_override is not None:
        num_blocks = cache.num_gpu_blocks_override
        advice = "raise --num-gpu-blocks-override"
    if num_blocks < 1:
        raise ConfigError(f"no memory is left for KV cache blocks of {block_bytes} bytes: {advice}")
    if num_blocks * cache.block_size < max_model_len:
        raise ConfigError(
            f"max_model_len={max_model_len} exceeds the {num_blocks * cache.block_size} tokens the KV "
            f"cache can hold ({num_blocks} blocks of {cache.block_size}): {advice} or lower --max-model-len"
        )
    return num_blocks


def useful_blocks(config: EngineConfig) -> int:
    """More could never be in use at once."""
    scheduler = config.scheduler
    longest = config.model.max_model_len + 1 + scheduler.num_lookahead_slots
    return scheduler.max_num_seqs * -(-longest // config.cache.block_size)


def _cpu_bytes(config: EngineConfig) -> int:
    """What the environment asks for, else half of the memory available now the weights are loaded."""
    if config.cache.cpu_kvcache_bytes is not None:
        return config.cache.cpu_kvcache_bytes
    available = available_memory_bytes()
    logger.info(
        "the KV cache may take half of the %.1f GiB of memory available to this process; set "
        "ASERVE_CPU_KVCACHE_SPACE (GiB) for another size",
        available / _GIB,
    )
    return available // 2


def count_swap_blocks(config: EngineConfig, block_bytes: int) -> int:
    """Blocks of host memory for preempted requests; 0 if preemption never swaps."""
    if config.scheduler.preemption_mode == "recompute":
        return 0
    granted = config.cache.swap_space_bytes
    if granted == DEFAULT_SWAP_BYTES:
        granted = min(granted, available_memory_bytes() // 4)
    return min(granted // block_bytes, useful_blocks(config))


def move_blocks(sources: list[KVCache], destinations: list[KVCache], pairs: list[tuple[int, int]]) -> None:
    """Copies whole blocks, ``(source, destination)``, between two caches of all layers.

    The caches may be on different devices; no destination may be named twice.
    """
    ops.swap_blocks(sources, destinations, pairs)


def allocate(
    num_blocks: int,
    shapes: list[tuple[int, int]],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[KVCache]:
    """Zeroed keys and values per layer, ``[num_blocks, num_kv_heads, block_size, head_size]``."""
    caches = []
    for heads, size in shapes:
        shape = (num_blocks, heads, block_size, size)
        caches.append((_zeros(shape, dtype, device), _zeros(shape, dtype, device)))
    return caches


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page. These are untouched pages of the kernel's: memory is used only once a
    # block is, and a large cache costs nothing at start.
    count = math.prod(shape) * dtype.itemsize
    return huge_pages(count)[:count].view(dtype).view(shape)
