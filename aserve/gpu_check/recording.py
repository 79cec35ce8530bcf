"""What a CUDA graph does, on the CPU: operations recorded once and repeated on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "unique")
"""Operations whose results the host waits for, which a capture forbids."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in WAITS:
            raise RuntimeError(f"operation not permitted when a stream is capturing: {name}")
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result


def record(call: Callable[[], Any]) -> Callable[[], None]:
    """Runs the call; the returned function runs its operations again, on the tensors as they then are.

    RuntimeError: the call reads a tensor on the host, as a capture on a GPU would refuse.
    """
    with _Recorder() as recorder:
        call()
    steps = recorder.steps

    def replay() -> None:
        for func, args, kwargs, result in steps:
            again = func(*args, **kwargs)
            # Later steps hold the tensors of the recording.
            for kept, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)

    return replay
