"""One small shape of every operation under compute-sanitizer, where that tool is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aserve.gpu_check import cases
from aserve.gpu_check.children import Unit
from aserve.gpu_check.machine import Machine
from aserve.gpu_check.options import Options
from aserve.gpu_check.results import Row

TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck")
ERROR_STATUS = 9
SECONDS = 200


def units(options: Options) -> list[Unit]:
    ops = [check.op for check in cases.tiny() if options.wants(check.op)]

    def run(machine: Machine) -> Iterator[Row]:
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        tool = shutil.which(TOOL) or shutil.which(f"{home}/bin/{TOOL}")
        if tool is None:
            yield {"skipped": f"{TOOL} is neither on the path nor in CUDA_HOME"}
            return
        # Most of the time is the tool's start, so all start at once; when dry, one stands for all.
        groups = [ops] if options.dry else [[op] for op in ops]
        checks = CHECKS[:1] if options.dry else CHECKS
        with tempfile.TemporaryDirectory() as folder:
            waiting = [
                _start(tool, name, group, options.dry, Path(folder) / f"{name}-{at}")
                for at, group in enumerate(groups)
                for name in checks
            ]
            while waiting:
                done = [each for each in waiting if each.process.poll() is not None]
                waiting = [each for each in waiting if each not in done]
                yield from (each.finding() for each in done)
                time.sleep(0.1)

    return [Unit(TOOL, {"kind": "sanitizer", "name": TOOL}, SECONDS, run)]


@dataclass(frozen=True)
class _Started:
    check: str
    ops: list[str]
    process: subprocess.Popen[bytes]
    log: Path

    def finding(self) -> Row:
        text = self.log.read_text(errors="replace")
        status = self.process.returncode
        summary = [line for line in text.splitlines() if " SUMMARY" in line]
        row: Row = {
            "name": self.check,
            "op": ",".join(self.ops),
            "passed": status == 0,
            "summary": summary[-1:],
        }
        if status != 0:
            row["error"] = f"status {status}: {text[-400:]}"
        return row


def _start(tool: str, check: str, ops: list[str], dry: bool, log: Path) -> _Started:
    command = [tool, "--tool", check, "--error-exitcode", str(ERROR_STATUS)]
    command += [sys.executable, "-m", "aserve.gpu_check.tiny", *(["--dry"] if dry else []), *ops]
    # Every tensor an allocation of its own, whose ends the tool knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
        )
    return _Started(check, ops, process, log)
