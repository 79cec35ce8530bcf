"""What the run is on, and whether the libraries fit each other."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator

import torch

from aserve.gpu_check.children import Unit
from aserve.gpu_check.machine import Machine
from aserve.gpu_check.options import Options
from aserve.gpu_check.results import Row
from aserve.ops import probe
from aserve.ops.hardware import BOUND

_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def units(options: Options) -> list[Unit]:
    return [
        Unit("machine", {"kind": "environment", "name": "machine"}, 30, _machine),
        Unit("schemas", {"kind": "environment", "name": "schemas"}, 60, _schemas),
    ]


def _machine(machine: Machine) -> Iterator[Row]:
    row: Row = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **machine.properties(),
    }
    tool = shutil.which("nvidia-smi")
    if tool is not None and not machine.dry:
        # Clocks are read and never set.
        command = [tool, f"--query-gpu={_QUERY}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        row["nvidia_smi"] = dict(zip(_QUERY.split(","), done.stdout.strip().split(", "), strict=False))
    yield row


def _schemas(machine: Machine) -> Iterator[Row]:
    """Every operation that is said to be bound has a kernel here, under the CPU library's schema."""
    mine = probe.schemas_of("aserve")
    if machine.dry:
        theirs = probe.schemas_of(probe.EMULATED)
        missing = [name for name in BOUND if name not in theirs]
        other = [
            name
            for name in theirs
            if theirs[name].removeprefix(probe.EMULATED) != mine[name].removeprefix("aserve")
        ]
    else:
        missing = [name for name in BOUND if not probe.has_kernel(name, "CUDA")]
        # Loading the CUDA library adds kernels to the operations that the CPU library defined.
        other = [name for name in BOUND if not probe.has_kernel(name, "CPU")]
    yield {"passed": not missing and not other, "missing": missing, "other_schema": other}
