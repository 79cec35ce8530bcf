"""The threads that kernels run on: a program that hammers them, and operations from several threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from aserve.ops import reference
from tests.ops.conftest import ROOT

Hammer = Callable[..., subprocess.CompletedProcess[str]]
SOURCES = [str(ROOT / "tests" / "ops" / "team_hammer.cpp"), str(ROOT / "cuda_ext" / "cpu" / "team.cpp")]


def _compiled(directory: Path, *flags: str) -> Hammer:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = directory / "hammer"
    done = subprocess.run(
        [compiler, "-std=c++20", "-pthread", *flags, *SOURCES, "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "-fsanitize=thread" in flags and done.returncode != 0 and "tsan" in done.stderr:
        pytest.skip("the compiler has no ThreadSanitizer runtime")
    assert done.returncode == 0, done.stderr

    def run(check: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(program), check], capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.fixture(scope="module")
def hammer(tmp_path_factory: pytest.TempPathFactory) -> Hammer:
    return _compiled(tmp_path_factory.mktemp("team"), "-O2")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Hammer:
    return _compiled(tmp_path_factory.mktemp("sanitized"), "-O1", "-g", "-fsanitize=thread")


@pytest.mark.parametrize("check", ["sums", "barriers", "callers", "nested", "fork", "names", "shares"])
def test_hammered(hammer: Hammer, check: str) -> None:
    done = hammer(check)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("check", ["sums", "barriers", "callers", "nested", "shares"])
def test_no_data_race(sanitized: Hammer, check: str) -> None:
    done = sanitized(check)
    assert done.returncode == 0, done.stderr


def test_the_hammer_refuses_unknown_checks(hammer: Hammer) -> None:
    assert hammer("nothing").returncode == 2


def test_operations_from_several_threads(loaded: ModuleType) -> None:
    torch.set_num_threads(3)
    torch.manual_seed(0)
    inputs = [torch.randn(200, 300 + i) for i in range(6)]
    weights = [torch.randn(300 + i) for i in range(6)]
    wanted = [reference.rms_norm(x, w, 1e-5) for x, w in zip(inputs, weights, strict=True)]

    def work(index: int) -> list[torch.Tensor]:
        return [loaded.rms_norm(inputs[index], weights[index], 1e-5) for _ in range(50)]

    with ThreadPoolExecutor(6) as pool:
        for results, expected in zip(pool.map(work, range(6)), wanted, strict=True):
            for result in results:
                torch.testing.assert_close(result, expected)


FORKED = """
import os
import torch
from aserve.ops import native
torch.set_num_threads(2)
x, w = torch.randn(100, 300), torch.randn(300)
before = native.rms_norm(x, w, 1e-5)
child = os.fork()
after = native.rms_norm(x, w, 1e-5)
same = bool((before - after).abs().max() == 0)
if child == 0:
    os._exit(0 if same else 1)  # torch's own handlers at exit wait for threads that the fork left behind
assert same
assert os.waitpid(child, 0)[1] == 0
"""


def test_operations_in_a_forked_process(loaded: ModuleType) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
