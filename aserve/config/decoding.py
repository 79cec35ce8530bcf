"""Defaults of guided decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aserve import registry
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from aserve.args import EngineArgs


@dataclass(frozen=True)
class DecodingConfig:
    """``guided_decoding_backend`` serves requests that name none; a name in ``registry.guided_backends``."""

    guided_decoding_backend: str


def resolve_decoding_config(args: EngineArgs) -> DecodingConfig:
    if args.guided_decoding_backend not in registry.guided_backends:
        raise ConfigError(
            f"guided_decoding_backend must be one of {', '.join(registry.guided_backends)}, "
            f"got {args.guided_decoding_backend!r}",
            param="guided_decoding_backend",
        )
    return DecodingConfig(args.guided_decoding_backend)
