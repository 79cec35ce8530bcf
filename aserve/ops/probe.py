"""The libraries' operations themselves, past the choice of :mod:`aserve.ops`: for checks of the kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aserve.errors import UnsupportedError
from aserve.ops import cuda, native

EMULATED = "aserve_emulated"
_kept: list[Any] = []


def operations() -> Any:
    """The operations, for tensors of every device a loaded library serves. UnsupportedError: no library."""
    reason = native.why_missing()
    if reason is not None:
        raise UnsupportedError(
            f"{native.LIBRARY.name} defines the operations, and {reason}; run: python setup_ext.py"
        )
    ops: Any = torch.ops
    return ops.aserve


def cuda_library() -> dict[str, Any]:
    """Loads the CUDA library; its entry of build.json. UnsupportedError: there is none for this device."""
    operations()
    entry = cuda._loaded()
    if entry is None:
        raise UnsupportedError(
            f"there is no usable {cuda.LIBRARY.name}; build it with: python setup_ext.py --target cuda"
        )
    capability = torch.cuda.get_device_capability()
    if not cuda.covers(entry["architectures"], (capability[0], capability[1])):
        built, number = ", ".join(entry["architectures"]), "".join(map(str, capability))
        raise UnsupportedError(f"{cuda.LIBRARY.name} is built for {built}; set ASERVE_CUDA_ARCH={number}")
    return entry


def emulated(library: Path, names: list[str]) -> Any:
    """The binding's operations over emulated kernels, in a namespace of their own, with the same schemas."""
    library_of: Any = torch.library.Library
    schemas = library_of(EMULATED, "DEF")
    for name, schema in schemas_of("aserve").items():
        if name in names:
            schemas.define(schema.removeprefix("aserve::"))
    _kept.append(schemas)  # it takes its operations with it when it goes
    ops: Any = torch.ops
    ops.load_library(str(library))
    return getattr(ops, EMULATED)


def schemas_of(namespace: str) -> dict[str, str]:
    """Schemas of the namespace's operations, by name."""
    ops: Any = torch.ops
    names = [
        n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{namespace}::")
    ]
    return {name: str(getattr(getattr(ops, namespace), name).default._schema) for name in sorted(names)}


def has_kernel(name: str, key: str) -> bool:
    """Whether the operation has a kernel for this dispatch key, "CPU" or "CUDA"."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aserve::{name}", key))
