"""The CUDA binding over the emulated kernels: built from the source tree, loaded as torch operations.

Both are kept under ``build/cuda`` by what they are made from, so a second build costs nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from aserve.errors import UnsupportedError
from aserve.ops import native, probe

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "cuda_ext" / "bind_cuda.cpp"


def builder() -> ModuleType:
    """setup_ext.py of the source tree. UnsupportedError: this aserve was installed without its sources."""
    if not SOURCE.exists():
        raise UnsupportedError(
            f"the emulated kernels are built from aserve's sources, and {SOURCE} is missing"
        )
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("setup_ext")
    finally:
        sys.path.pop(0)


def sources_digest() -> str:
    """Of the kernels' sources in this tree; see cuda_ext/cuda/build.py."""
    return str(builder().cuda_kernels().sources_digest())


def build(kernels: Path | None = None) -> Path:
    """The binding over emulated kernels, those given or the ones built now; returns its library.

    UnsupportedError: there is no compiler here.
    """
    setup = builder()
    cuda = setup.cuda_kernels()
    try:
        if kernels is None:
            kernels, _ = cuda.build("emulation", [], os.cpu_count() or 1)
        tools = setup.find_toolchain()
    except (cuda.NothingToBuildError, setup.NothingToBuildError) as reason:
        raise UnsupportedError(f"the emulated kernels cannot be built: {reason}") from None
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += ["-DASERVE_EMULATED", f"-DTORCH_TARGET_VERSION={setup.TORCH_TARGET}"]
    flags += ["-isystem", str(tools.torch / "include")]
    link = [str(kernels), f"-Wl,-rpath,{kernels.parent}", *setup.link_flags(tools)[1:]]
    headers = setup.headers_digest(True)
    made_from = (SOURCE.read_bytes(), cuda.sources_digest(), headers, *flags, *link, tools.version)
    library: Path = cuda.OUTPUT / f"libaserve_bound-{setup.digest(*made_from, tools.torch_version)[:20]}.so"
    if not library.exists():
        aside = library.with_name(f"{library.name}.{os.getpid()}")
        setup.run([tools.compiler, *flags, "-shared", "-o", str(aside), str(SOURCE), *link])
        aside.replace(library)
    return library


@cache
def load(library: Path) -> Any:
    """The library's operations, under the schemas of the CPU library's namesakes."""
    return probe.emulated(library, names())


def names() -> list[str]:
    """The operations that the binding implements."""
    import re

    return re.findall(r'm\.impl\("(\w+)"', SOURCE.read_text(encoding="utf-8"))


def operations() -> Any:
    if native.why_missing() is not None:
        raise UnsupportedError(
            f"{native.LIBRARY.name} defines the operations' schemas, and {native.why_missing()}; "
            "run: python setup_ext.py"
        )
    return load(build())
