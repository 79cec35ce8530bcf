"""The same tokens at every level of the kernels: each in a process of its own, which the level is for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aserve.ops import native

pytestmark = pytest.mark.timeout(900)

HERE = Path(__file__).resolve().parent
CASES = {
    "smollm2": "test_a_mixed_batch_of_32[smollm2-16-1]",
    "gemma3-270m": "test_a_mixed_batch_of_32[gemma3-270m-16-1]",
}


@pytest.mark.parametrize(
    ("level", "model"),
    [
        ("avx2", "smollm2"),
        ("reference", "smollm2"),
        pytest.param("avx2", "gemma3-270m", marks=pytest.mark.slow),
        pytest.param("reference", "gemma3-270m", marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens(level: str, model: str) -> None:
    if level != "reference" and native.level() == "reference":
        pytest.skip("the native kernels are not built")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_parity.py::{CASES[model]}"],
        cwd=HERE,
        env=os.environ | {native.LEVEL_VARIABLE: level, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
