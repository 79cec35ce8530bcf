"""Builds the emulated kernels once, and sees to it that no test writes around its buffers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aserve.gpu_check import emulation
from aserve.ops import native
from tests.cuda.emulator import FORWARD, Emulator

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "cuda_ext" / "cuda" / "build.py"
FULL = os.environ.get("ASERVE_KERNEL_CASES") == "full"
TARGET_VARIABLE = "ASERVE_EMULATION"  # "asan" for the build with sanitizers


def run_build(*arguments: str, script: Path = BUILD, **environment: str) -> subprocess.CompletedProcess[str]:
    # A preloaded sanitizer is for this process, not for compilers.
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env={**clean, **environment},
        check=False,
    )


@pytest.fixture(scope="session")
def library() -> Path:
    target = os.environ.get(TARGET_VARIABLE, "emulation")
    done = run_build(target, "--with", str(HERE / "faults.cu"))
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def loaded(library: Path) -> Emulator:
    return Emulator(library)


@pytest.fixture(scope="session")
def bound(library: Path) -> Any:
    """The operations over the emulated kernels, with the schemas of the CPU library's."""
    if native.why_missing() is not None:
        pytest.skip(f"no CPU library, which defines the schemas: {native.why_missing()}")
    return emulation.load(emulation.build(library))


@pytest.fixture
def emulator(loaded: Emulator) -> Iterator[Emulator]:
    loaded.order(FORWARD)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    conflicts = loaded.conflicts()
    yield loaded
    torch.set_num_threads(threads)
    assert loaded.release() == 0, "something was written around a buffer"
    assert loaded.conflicts() == conflicts, "ldmatrix met bank conflicts"


@pytest.fixture
def natively(emulator: Emulator) -> Emulator:
    """For tests whose fault a sanitizer would end the process for."""
    if os.environ.get(TARGET_VARIABLE) == "asan":
        pytest.skip("AddressSanitizer ends the process at this fault")
    return emulator
