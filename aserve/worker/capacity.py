"""How many KV blocks fit a device beside the model: measured with the largest step there can be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from aserve.config.engine import EngineConfig
from aserve.errors import ConfigError
from aserve.worker.accelerator import Accelerator
from aserve.worker.kv_cache import useful_blocks

logger = logging.getLogger(__name__)

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """Bytes of device memory.

    total: of the device. peak: of torch's tensors, the weights included, in the largest step. outside:
    taken by others, which are the driver, libraries and other processes. graphs: for captured steps.
    """

    total: int
    peak: int
    outside: int
    graphs: int = 0

    def left(self, utilization: float) -> int:
        """What of the granted share no step needs."""
        return int(self.total * utilization) - self.peak - self.outside - self.graphs

    def __str__(self) -> str:
        peak, outside, graphs = (each / _GIB for each in (self.peak, self.outside, self.graphs))
        return (
            f"{self.total / _GIB:.2f} GiB, of which weights and the largest step take {peak:.2f} GiB, "
            f"captured steps {graphs:.2f} GiB, others {outside:.2f} GiB"
        )


def profile(
    accelerator: Accelerator, steps: list[Callable[[], None]], captured: Callable[[], None] | None
) -> MemoryProfile:
    """Runs the largest steps of each kind and reads what they took.

    captured: the largest step that will be captured; its memory is kept apart from that of other steps.
    """
    accelerator.synchronize()
    accelerator.release()
    accelerator.reset_peak()
    for step in steps:
        step()
        accelerator.synchronize()
    peak = accelerator.peak()
    graphs = 0
    if captured is not None:
        before = accelerator.taken()
        accelerator.reset_peak()
        captured()
        accelerator.synchronize()
        graphs = accelerator.peak() - before
    accelerator.release()
    free, total = accelerator.memory()
    return MemoryProfile(total, peak, max(0, total - free - accelerator.reserved()), graphs)


def count_device_blocks(config: EngineConfig, block_bytes: int, extra: int, memory: MemoryProfile) -> int:
    """Blocks for requests.

    extra: bytes the cache needs besides. ConfigError: too little memory, or too few blocks to be of use.
    """
    cache, max_model_len = config.cache, config.model.max_model_len
    left = memory.left(cache.gpu_memory_utilization) - extra
    fits = max(0, left) // block_bytes
    if cache.num_gpu_blocks_override is not None:
        blocks = cache.num_gpu_blocks_override
        at_most = max(0, memory.left(1.0) - extra) // block_bytes
        if blocks > at_most:
            raise ConfigError(
                f"num_gpu_blocks_override: {blocks} blocks of {block_bytes} bytes do not fit the device, "
                f"which has room for {at_most} (it has {memory}); lower it or leave it out",
                param="num_gpu_blocks_override",
            )
        logger.info("num_gpu_blocks_override: %d KV blocks where %d would fit", blocks, fits)
        return blocks
    share = f"{cache.gpu_memory_utilization:g} of the device's memory"
    if fits < 1:
        raise ConfigError(
            f"gpu_memory_utilization: {share} leaves none for the KV cache (it has {memory}); raise it, "
            "lower max_num_batched_tokens or max_num_seqs, or choose a smaller model",
            param="gpu_memory_utilization",
        )
    # What no request needs still serves the prefix cache.
    blocks = fits if cache.enable_prefix_caching else min(fits, useful_blocks(config))
    if blocks * cache.block_size < max_model_len:
        raise ConfigError(
            f"gpu_memory_utilization: {share} leaves {blocks} blocks of {cache.block_size} tokens, too few "
            f"for a sequence of max_model_len ({max_model_len}) tokens; raise it or lower max_model_len to "
            f"{blocks * cache.block_size} or less",
            param="gpu_memory_utilization",
        )
    return blocks
