"""Arguments whose feature this release does not have: one row each, deleted when the feature comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aserve import registry
from aserve.errors import UnsupportedError

if TYPE_CHECKING:
    from aserve.args import EngineArgs
    from aserve.config.engine import EngineConfig
    from aserve.config.server import ServerArgs


@dataclass(frozen=True)
class Unbuilt:
    """An argument, whether it was asked for, and what to do instead."""

    argument: str
    asked: Callable[[EngineArgs, EngineConfig], bool]
    instead: str

    @property
    def message(self) -> str:
        return f"{self.argument} is not built in this release; {self.instead}"


ROWS = (
    Unbuilt(
        "enable_lora",
        lambda args, config: config.lora is not None,
        "merge the adapter into the model's weights and serve those",
    ),
    Unbuilt(
        "speculative_model",
        lambda args, config: config.speculative is not None,
        "leave it out: outputs are the same without it",
    ),
    Unbuilt(
        "image_input_type", lambda args, config: config.vision_language is not None, "serve a text model"
    ),
    Unbuilt(
        "worker_use_ray", lambda args, config: args.worker_use_ray, "leave it out to run in this process"
    ),
    Unbuilt(
        "tensor_parallel_size above 1",
        lambda args, config: config.parallel.tensor_parallel_size > 1,
        "use 1 and a model that fits one device",
    ),
    Unbuilt(
        "pipeline_parallel_size above 1",
        lambda args, config: config.parallel.pipeline_parallel_size > 1,
        "use 1 and a model that fits one device",
    ),
    Unbuilt(
        "distributed_executor_backend",
        lambda args, config: not registry.executors.built(config.parallel.executor),
        "leave it out to run in this process",
    ),
    Unbuilt(
        "engine_use_ray",
        lambda args, config: getattr(args, "engine_use_ray", False),
        "leave it out to run the engine in the server's process",
    ),
    Unbuilt(
        "max_parallel_loading_workers",
        lambda args, config: args.max_parallel_loading_workers is not None,
        "leave it out: a single worker loads the weights",
    ),
    Unbuilt(
        "quantization",
        lambda args, config: (
            config.model.quantization is not None
            and not registry.quantizations.built(config.model.quantization)
        ),
        "use an unquantised checkpoint or a .gguf file",
    ),
    Unbuilt("kv_cache_dtype", lambda args, config: config.cache.cache_dtype != "auto", "use 'auto'"),
    Unbuilt(
        "quantization_param_path",
        lambda args, config: args.quantization_param_path is not None,
        "leave it out: the KV cache has the model's data type and needs no scales",
    ),
    Unbuilt(
        "enable_prefix_caching",
        lambda args, config: config.cache.enable_prefix_caching,
        "leave it out: outputs are the same without it",
    ),
    Unbuilt(
        "num_lookahead_slots above 0", lambda args, config: config.scheduler.num_lookahead_slots > 0, "use 0"
    ),
    Unbuilt(
        "tokenizer_pool_size above 0",
        lambda args, config: config.tokenizer_pool is not None,
        "use 0: long prompts are tokenized in a thread",
    ),
    Unbuilt(
        "load_format",
        lambda args, config: not registry.loaders.built(config.load.load_format),
        "use 'auto', 'safetensors' or 'pt'",
    ),
    Unbuilt(
        "swap_space other than 0 or the default 4",
        lambda args, config: args.swap_space not in (0, 4),
        "leave it out: preempted requests are recomputed",
    ),
)


def refuse_unbuilt(args: EngineArgs, config: EngineConfig) -> None:
    """Raises UnsupportedError for the first row that is asked for."""
    for row in ROWS:
        if row.asked(args, config):
            raise UnsupportedError(row.message, param=row.argument.split()[0])


def refuse_unbuilt_server(args: ServerArgs) -> None:
    """The same for the server's own arguments."""
    if args.lora_modules:
        raise UnsupportedError(
            "lora_modules is not built in this release; merge the adapter into the "
            "model's weights and serve those",
            param="lora_modules",
        )
