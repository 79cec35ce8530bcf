"""How many workers there are and how they are run."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aserve import registry
from aserve.config.device import DeviceConfig
from aserve.config.model import ModelConfig
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from aserve.args import EngineArgs

IN_PROCESS = "uni"


@dataclass(frozen=True)
class ParallelConfig:
    """Workers. ``executor`` is a name in ``registry.executors``."""

    pipeline_parallel_size: int
    tensor_parallel_size: int
    executor: str
    max_parallel_loading_workers: int | None
    disable_custom_all_reduce: bool
    ray_workers_use_nsight: bool

    @property
    def world_size(self) -> int:
        return self.pipeline_parallel_size * self.tensor_parallel_size


def distributed_backends() -> list[str]:
    """Names ``distributed_executor_backend`` may have."""
    return [name for name in registry.executors.names() if name != IN_PROCESS]


def resolve_parallel_config(args: EngineArgs, model: ModelConfig, device: DeviceConfig) -> ParallelConfig:
    tp, pp = args.tensor_parallel_size, args.pipeline_parallel_size
    for name, size in (("tensor_parallel_size", tp), ("pipeline_parallel_size", pp)):
        if size < 1:
            raise ConfigError(f"{name} must be at least 1, got {size}", param=name)
    loading = args.max_parallel_loading_workers
    if loading is not None and loading < 1:
        raise ConfigError(
            f"max_parallel_loading_workers must be at least 1, got {loading}",
            param="max_parallel_loading_workers",
        )
    executor = _resolve_executor(args, tp * pp, device)
    if args.ray_workers_use_nsight and executor != "ray":
        raise ConfigError(
            "ray_workers_use_nsight needs distributed_executor_backend='ray'", param="ray_workers_use_nsight"
        )
    if model.num_attention_heads % tp:
        raise ConfigError(
            f"tensor_parallel_size ({tp}) does not divide the model's "
            f"{model.num_attention_heads} attention heads",
            param="tensor_parallel_size",
        )
    if model.num_layers % pp:
        raise ConfigError(
            f"pipeline_parallel_size ({pp}) does not divide the model's {model.num_layers} layers",
            param="pipeline_parallel_size",
        )
    return ParallelConfig(
        pipeline_parallel_size=pp,
        tensor_parallel_size=tp,
        executor=executor,
        max_parallel_loading_workers=loading,
        disable_custom_all_reduce=args.disable_custom_all_reduce,
        ray_workers_use_nsight=args.ray_workers_use_nsight,
    )


def _resolve_executor(args: EngineArgs, world_size: int, device: DeviceConfig) -> str:
    backend = args.distributed_executor_backend
    known = distributed_backends()
    if backend is not None and backend not in known:
        raise ConfigError(
            f"distributed_executor_backend must be one of {', '.join(known)}, got {backend!r}",
            param="distributed_executor_backend",
        )
    if args.worker_use_ray:
        if backend not in (None, "ray"):
            raise ConfigError(
                f"worker_use_ray contradicts distributed_executor_backend={backend!r}; "
                "leave worker_use_ray out",
                param="worker_use_ray",
            )
        backend = "ray"
    if backend is None:
        if world_size == 1:
            return IN_PROCESS
        backend = "ray" if importlib.util.find_spec("ray") else "mp"
    if backend == "mp" and device.device == "cuda" and world_size > device.num_devices:
        raise ConfigError(
            f"distributed_executor_backend 'mp' runs {world_size} workers and there are "
            f"{device.num_devices} CUDA devices; use 'ray' across machines",
            param="distributed_executor_backend",
        )
    return backend
