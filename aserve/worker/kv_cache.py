"""How many KV blocks there is memory for, and the tensors that hold them."""

from __future__ import annotations

import numpy as np
import torch

from aserve.attention.base import KVCache
from aserve.config.engine import EngineConfig
from aserve.errors import ConfigError

_ALIGNMENT = 64


def bytes_per_block(shapes: list[tuple[int, int]], block_size: int, dtype: torch.dtype) -> int:
    """shapes: ``(num_kv_heads, head_size)`` of each layer."""
    return sum(2 * block_size * heads * size for heads, size in shapes) * dtype.itemsize


def count_blocks(config: EngineConfig, block_bytes: int, device: torch.device) -> int:
    """Blocks that fit the memory the configuration grants; ConfigError if too few to be of use."""
    cache, max_model_len = config.cache, config.model.max_model_len
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        granted = int(total * cache.gpu_memory_utilization) - (total - free)
        advice = "raise --gpu-memory-utilization"
    else:
        granted = cache.cpu_kvcache_bytes
        advice = "raise ASERVE_CPU_KVCACHE_SPACE (GiB)"
    num_blocks = max(0, granted // block_bytes)
    # More than this could never be in use at once.
    useful = config.scheduler.max_num_seqs * -(-(max_model_len + 1) // cache.block_size)
    num_blocks = min(num_blocks, useful)
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
    # torch.zeros writes every page. numpy's zeros are untouched pages of the kernel's: memory is
    # used only once a block is, and a large cache costs nothing at start.
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(count + _ALIGNMENT, dtype=np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[skip : skip + count]).view(dtype).view(shape)
