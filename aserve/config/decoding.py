"""Settings of guided decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aserve import registry
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from aserve.args import EngineArgs

DEFAULT_BACKEND = "llguidance"


@dataclass(frozen=True)
class DecodingConfig:
    """How outputs are guided.

    guided_decoding_backend: serves requests that name none; a name in ``registry.guided_backends``.
    compile_timeout: seconds that compiling one guide may take; None leaves it to the backend.
    cache_bytes: memory of the compiled guides that are kept.
    """

    guided_decoding_backend: str = DEFAULT_BACKEND
    compile_timeout: float | None = None
    cache_bytes: int = 256 << 20


def resolve_decoding_config(args: EngineArgs) -> DecodingConfig:
    """Checks the settings, and that the backend's package is installed. Raises ConfigError."""
    name = args.guided_decoding_backend
    if name not in registry.guided_backends:
        raise ConfigError(
            f"guided_decoding_backend must be one of {', '.join(registry.guided_backends)}, got {name!r}",
            param="guided_decoding_backend",
        )
    timeout = args.guided_compile_timeout
    if timeout is not None and not 0 < timeout < math.inf:
        raise ConfigError("guided_compile_timeout must be seconds above 0", param="guided_compile_timeout")
    if args.guided_cache_size < 0:
        raise ConfigError("guided_cache_size must be at least 0 MiB", param="guided_cache_size")
    missing = registry.guided_backends.load(name).missing()
    if missing is not None:
        raise ConfigError(f"guided_decoding_backend {name} {missing}", param="guided_decoding_backend")
    return DecodingConfig(name, timeout, args.guided_cache_size << 20)
