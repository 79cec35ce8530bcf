"""Builds the extension for these tests, and runs each against the references and every native level."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from aserve.errors import ConfigError
from aserve.ops import native, reference

ROOT = Path(__file__).resolve().parents[2]


def run_build(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "setup_ext.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.fixture(scope="session")
def built() -> Path:
    """The library's path. Skips where nothing can be built, with the builder's reason."""
    done = run_build()
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return native.LIBRARY


@pytest.fixture
def loaded(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The native operations at the best level, whatever the environment chose when aserve was imported."""
    monkeypatch.delenv(native.LEVEL_VARIABLE, raising=False)
    monkeypatch.setattr(native, "_library", None)
    native.why_missing.cache_clear()
    if native.load() == "reference":
        pytest.skip(f"the native kernels do not run here: {native.why_missing() or 'the CPU is too old'}")
    native.select("auto")
    yield native
    native.select("auto")


@pytest.fixture(params=["reference", *native.LEVELS])
def implementation(request: pytest.FixtureRequest) -> ModuleType:
    """A module with the operations: the references, or the native ones at each level."""
    if request.param == "reference":
        return reference
    module: ModuleType = request.getfixturevalue("loaded")
    try:
        native.select(request.param)
    except ConfigError as error:
        pytest.skip(str(error))
    return module


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh memory holds NaN, so that an output never written shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.empty_like(torch.zeros(3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
