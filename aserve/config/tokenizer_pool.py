"""Tokenizing beside the engine's process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aserve import registry
from aserve.config.load import json_dict
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from aserve.args import EngineArgs


@dataclass(frozen=True)
class TokenizerPoolConfig:
    """``pool_size`` workers of the kind ``pool_type``, a name in ``registry.tokenizer_pools``."""

    pool_size: int
    pool_type: str
    extra_config: dict[str, Any] = field(default_factory=dict)


def resolve_tokenizer_pool_config(args: EngineArgs) -> TokenizerPoolConfig | None:
    """None for a pool of 0, whose other arguments are ignored."""
    if args.tokenizer_pool_size < 0:
        raise ConfigError(
            f"tokenizer_pool_size must be 0 or more, got {args.tokenizer_pool_size}",
            param="tokenizer_pool_size",
        )
    if args.tokenizer_pool_size == 0:
        return None
    if args.tokenizer_pool_type not in registry.tokenizer_pools:
        raise ConfigError(
            f"tokenizer_pool_type must be one of {', '.join(registry.tokenizer_pools)}, "
            f"got {args.tokenizer_pool_type!r}",
            param="tokenizer_pool_type",
        )
    extra = json_dict("tokenizer_pool_extra_config", args.tokenizer_pool_extra_config)
    return TokenizerPoolConfig(args.tokenizer_pool_size, args.tokenizer_pool_type, extra)
