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
    """An argument, its refused values ("" for all), whether one was given, what to do instead."""

    argument: str
    values: str
    asked: Callable[[EngineArgs, EngineConfig], bool]
    instead: str

    @property
    def message(self) -> str:
        return f"{f'{self.argument} {self.values}'.strip()} is not built in this release; {self.instead}"


_MERGE = "merge the adapter into the model's weights and serve those"

ROWS = (
    Unbuilt("enable_lora", "", lambda args, config: config.lora is not None, _MERGE),
    Unbuilt(
        "speculative_model",
        "",
        lambda args, config: config.speculative is not None,
        "leave it out: outputs are distributed alike without it",
    ),
    Unbuilt(
        "image_input_type",
        "",
        lambda args, config: config.vision_language is not None,
        "leave it out and serve a text model",
    ),
    Unbuilt(
        "worker_use_ray", "", lambda args, config: args.worker_use_ray, "leave it out to run in this process"
    ),
    Unbuilt(
        "tensor_parallel_size",
        "above 1",
        lambda args, config: config.parallel.tensor_parallel_size > 1,
        "use 1 and a model that fits one device",
    ),
    Unbuilt(
        "pipeline_parallel_size",
        "above 1",
        lambda args, config: config.parallel.pipeline_parallel_size > 1,
        "use 1 and a model that fits one device",
    ),
    Unbuilt(
        "distributed_executor_backend",
        "",
        lambda args, config: not registry.executors.built(config.parallel.executor),
        "leave it out to run in this process",
    ),
    Unbuilt(
        "engine_use_ray",
        "",
        lambda args, config: getattr(args, "engine_use_ray", False),
        "leave it out to run the engine in the server's process",
    ),
    Unbuilt(
        "max_parallel_loading_workers",
        "",
        lambda args, config: args.max_parallel_loading_workers is not None,
        "leave it out: a single worker loads the weights",
    ),
    Unbuilt(
        "quantization",
        "other than gguf",
        lambda args, config: (
            config.model.quantization is not None
            and not registry.quantizations.built(config.model.quantization)
        ),
        "use an unquantised checkpoint or a .gguf file",
    ),
    Unbuilt(
        "kv_cache_dtype",
        "other than auto",
        lambda args, config: config.cache.cache_dtype != "auto",
        "use auto, the model's data type",
    ),
    Unbuilt(
        "quantization_param_path",
        "",
        lambda args, config: args.quantization_param_path is not None,
        "leave it out: a KV cache in the model's data type needs no scales",
    ),
    Unbuilt(
        "tokenizer_pool_size",
        "above 0",
        lambda args, config: config.tokenizer_pool is not None,
        "use 0: long prompts are tokenized in a thread",
    ),
    Unbuilt(
        "load_format",
        "npcache or tensorizer",
        lambda args, config: not registry.loaders.built(config.load.load_format),
        "use auto, safetensors or pt",
    ),
)


def refuse_unbuilt(args: EngineArgs, config: EngineConfig) -> None:
    """Raises UnsupportedError for the first row that is asked for."""
    for row in ROWS:
        if row.asked(args, config):
            raise UnsupportedError(row.message, param=row.argument)


def refuse_unbuilt_server(args: ServerArgs) -> None:
    """The same for the server's own arguments."""
    if args.lora_modules:
        raise UnsupportedError(f"lora_modules is not built in this release; {_MERGE}", param="lora_modules")


def unbuilt_note(argument: str) -> str:
    """What of an argument this release refuses, as a sentence for the tables; "" for nothing."""
    if argument == "lora_modules":
        return "Not built yet."
    for row in ROWS:
        if row.argument == argument:
            return f"Not built yet{f': {row.values}' if row.values else ''}."
    return ""
