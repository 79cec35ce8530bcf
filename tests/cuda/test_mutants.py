"""Every barrier and wait of the attention kernels is needed: without one, some case fails."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from aserve.gpu_check.paging import Case, exact
from tests.cuda.attention import attend, batch_of, compare
from tests.cuda.conftest import FULL, ROOT, run_build
from tests.cuda.emulator import Emulator, orders

MEETING = re.compile(r"^ +(__syncthreads\(\)|__syncwarp\(\)|copy_async_wait<\d>\(\));$", re.MULTILINE)

UNSEEN = {
    # The emulation's ldmatrix and mma hold their warp together, which hardware does not promise for memory.
    ("decode_tensor", 4): "__syncwarp before ldmatrix",
    ("decode_tensor", 5): "__syncwarp behind mma",
    # The group committed last is empty there; the wait states it.
    ("decode_tensor", 6): "a wait for no copy",
}


def sites() -> list[tuple[str, int]]:
    found = []
    for kernel in ("decode_simple", "decode_tensor", "prefill"):
        text = (ROOT / "cuda_ext" / "cuda" / f"{kernel}.cu").read_text()
        found += [(kernel, index) for index in range(len(MEETING.findall(text)))]
    return found


def correct(emulator: Emulator, kernel: str) -> bool:
    cases = [Case(((1, 300), (7, 150)), 8, 2), Case(((70, 200), (30, 70)), 4, 1, 128)]
    for case in cases:
        for cache_dtype in (torch.bfloat16, torch.float8_e4m3fn):
            batch = batch_of(case, torch.bfloat16, cache_dtype)
            for order, seed in orders():
                emulator.order(order, seed)
                try:
                    # A grid too small for the queries, so that blocks serve several tiles.
                    got = attend(emulator, kernel, batch, max_query_len=1)
                    compare(got, exact(batch), kernel, batch.values)
                except AssertionError:
                    return False
    return True


@pytest.mark.skipif(not FULL, reason="make kernels-full")
@pytest.mark.parametrize(("kernel", "site"), sites())
def test_without_one(tmp_path: Path, kernel: str, site: int) -> None:
    if (kernel, site) in UNSEEN:
        pytest.skip(f"cannot be seen here: {UNSEEN[kernel, site]}")
    sources = tmp_path / "cuda_ext" / "cuda"
    shutil.copytree(ROOT / "cuda_ext" / "cuda", sources)
    built = tmp_path / "build" / "cuda"
    built.mkdir(parents=True)
    for made in (ROOT / "build" / "cuda").glob("emulation-*"):
        shutil.copy2(made, built)  # all but the changed file's object serve again
    file = sources / f"{kernel}.cu"
    text = file.read_text()
    gone = list(MEETING.finditer(text))[site]
    file.write_text(text[: gone.start(1)] + text[gone.end(1) :])
    done = run_build("emulation", script=sources / "build.py")
    assert done.returncode == 0, done.stderr
    emulator = Emulator(Path(done.stdout.splitlines()[-1]))
    right = correct(emulator, kernel)
    emulator.release()
    assert not right, f"{gone[1]} at line {text[: gone.start()].count(chr(10)) + 1} can go unnoticed"
