"""One small shape of every operation under compute-sanitizer, where that tool is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from aserve.gpu_check import cases
from aserve.gpu_check.children import Unit
from aserve.gpu_check.machine import Machine
from aserve.gpu_check.options import Options
from aserve.gpu_check.results import Row

TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck")
ERROR_STATUS = 9
SECONDS = 140


def units(options: Options) -> list[Unit]:
    ops = [check.op for check in cases.tiny() if options.wants(check.op)]
    return [_unit(name, ops, options.dry) for name in CHECKS]


def _unit(name: str, ops: list[str], dry: bool) -> Unit:
    def run(machine: Machine) -> Iterator[Row]:
        tool = shutil.which(TOOL) or shutil.which(
            f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/{TOOL}"
        )
        if tool is None:
            yield {"skipped": f"{TOOL} is neither on the path nor in CUDA_HOME"}
            return
        # A process of its own for each, all at once: most of the time is the tool's start. Not so when dry.
        groups = [ops] if dry else [[op] for op in ops]
        started = [(group, _start(tool, name, group, dry)) for group in groups]
        for group, process in started:
            text, _ = process.communicate()
            summary = [
                line for line in text.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line
            ]
            row: Row = {"op": ",".join(group), "passed": process.returncode == 0, "summary": summary[-1:]}
            if process.returncode != 0:
                row["error"] = f"status {process.returncode}: {text[-400:]}"
            yield row

    return Unit(name, {"kind": "sanitizer", "name": name}, SECONDS, run)


def _start(tool: str, name: str, ops: list[str], dry: bool) -> subprocess.Popen[str]:
    command = [tool, "--tool", name, "--error-exitcode", str(ERROR_STATUS)]
    command += [sys.executable, "-m", "aserve.gpu_check.tiny", *(["--dry"] if dry else []), *ops]
    # Every tensor an allocation of its own, whose ends the tool knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
