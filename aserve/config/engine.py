"""Everything the engine is configured by, bundled and cross-checked."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aserve.config.cache import CacheConfig, resolve_cache_config
from aserve.config.cli import check_types
from aserve.config.decoding import DecodingConfig, resolve_decoding_config
from aserve.config.device import DeviceConfig, resolve_device_config
from aserve.config.load import LoadConfig, resolve_load_config
from aserve.config.lora import LoRAConfig, resolve_lora_config
from aserve.config.model import ModelConfig, resolve_model_config, resolve_model_path
from aserve.config.parallel import ParallelConfig, resolve_parallel_config
from aserve.config.scheduler import SchedulerConfig, resolve_scheduler_config
from aserve.config.speculative import SpeculativeConfig, resolve_speculative_config
from aserve.config.tokenizer_pool import TokenizerPoolConfig, resolve_tokenizer_pool_config
from aserve.config.unbuilt import refuse_unbuilt
from aserve.config.vision import VisionLanguageConfig, resolve_vision_config
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from aserve.args import EngineArgs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """One config per room; the optional ones are None when their feature is off."""

    model: ModelConfig
    cache: CacheConfig
    parallel: ParallelConfig
    scheduler: SchedulerConfig
    device: DeviceConfig
    load: LoadConfig
    lora: LoRAConfig | None
    vision_language: VisionLanguageConfig | None
    speculative: SpeculativeConfig | None
    decoding: DecodingConfig
    tokenizer_pool: TokenizerPoolConfig | None


def resolve_engine_config(args: EngineArgs) -> EngineConfig:
    """Checks every argument and reads the model's config, but no weights.

    Raises ConfigError for the first value that cannot work and, once all of them could, UnsupportedError
    for the first feature this release does not have.
    """
    check_types(args)
    _check_logging(args)
    device = resolve_device_config(args)
    model_path = resolve_model_path(args.model)
    load = resolve_load_config(args, model_path)
    decoding = resolve_decoding_config(args)
    tokenizer_pool = resolve_tokenizer_pool_config(args)
    model = resolve_model_config(args, model_path, device)
    cache = resolve_cache_config(args, model)
    parallel = resolve_parallel_config(args, model, device)
    scheduler = resolve_scheduler_config(args, model)
    config = EngineConfig(
        model=model,
        cache=cache,
        parallel=parallel,
        scheduler=scheduler,
        device=device,
        load=load,
        lora=resolve_lora_config(args, model, scheduler),
        vision_language=resolve_vision_config(args, model),
        speculative=resolve_speculative_config(args, model, parallel, device),
        decoding=decoding,
        tokenizer_pool=tokenizer_pool,
    )
    refuse_unbuilt(args, config)
    _warn_of_idle_arguments(args)
    return config


def _check_logging(args: EngineArgs) -> None:
    max_log_len = getattr(args, "max_log_len", None)
    if max_log_len is not None and max_log_len < 0:
        raise ConfigError(f"max_log_len must be 0 or more, got {max_log_len}", param="max_log_len")


_LORA_ONLY = (
    "max_loras",
    "max_lora_rank",
    "fully_sharded_loras",
    "lora_extra_vocab_size",
    "long_lora_scaling_factors",
    "lora_dtype",
    "max_cpu_loras",
)
_SPECULATIVE_ONLY = (
    "speculative_max_model_len",
    "speculative_disable_by_batch_size",
    "ngram_prompt_lookup_max",
    "ngram_prompt_lookup_min",
)
_IMAGE_ONLY = ("image_token_id", "image_input_shape", "image_feature_size")


def _warn_of_idle_arguments(args: EngineArgs) -> None:
    """Says which arguments were set beside the switch of their feature, and so do nothing."""
    for switch, names in (
        ("enable_lora", _LORA_ONLY),
        ("speculative_model", _SPECULATIVE_ONLY),
        ("image_input_type", _IMAGE_ONLY),
    ):
        if getattr(args, switch):
            continue
        idle = [name for name in names if getattr(args, name) != getattr(type(args), name)]
        if idle:
            logger.warning("%s without %s: no effect", ", ".join(idle), switch)
