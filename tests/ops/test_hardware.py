"""Which CUDA kernels count as verified, and that only those are chosen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aserve.errors import ConfigError
from aserve.ops import cuda, hardware
from aserve.ops.hardware import Combination
from tests.cuda.test_binding import BOUND
from tests.ops.conftest import ROOT

NORM = Combination("rms_norm", "bfloat16")
ROW: dict[str, Any] = {
    "kind": "correctness",
    "op": "rms_norm",
    "dtype": "bfloat16",
    "cache_dtype": None,
    "passed": True,
    "device": "NVIDIA H100",
    "capability": [9, 0],
    "date": "2026-01-02",
    "sources": "abc",
}


def results(*changes: dict[str, Any]) -> list[hardware.Result]:
    return hardware.read(json.dumps({**ROW, **change}) for change in changes)


def test_one_pass_verifies_what_ran_and_nothing_else() -> None:
    found = results({}, {"kind": "timing", "passed": None})
    assert hardware.verified(NORM, 9, "abc", found)
    assert not hardware.verified(NORM, 8, "abc", found), "another generation"
    assert not hardware.verified(NORM, 9, "abd", found), "other kernels"
    assert not hardware.verified(Combination("rms_norm", "float16"), 9, "abc", found)
    assert not hardware.verified(NORM, 9, "abc", [])


def test_one_failure_outweighs_every_pass() -> None:
    assert not hardware.verified(NORM, 9, "abc", results({}, {"passed": False}, {}))


@pytest.mark.parametrize(
    "change",
    [
        {"passed": "yes"},
        {"op": "rms_nrm"},
        {"cache_dtype": "bfloat16"},
        {"capability": []},
        {"sources": ""},
        {"date": None},
    ],
)
def test_a_bad_line_is_refused_by_number(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="line 2, is no result"):
        results({}, change)


def test_table() -> None:
    found = results({}, {"capability": [8, 0], "device": "NVIDIA A100", "passed": False}, {"sources": "old"})
    lines = hardware.render("abc", found).splitlines()
    line = next(line for line in lines if line.startswith("| `rms_norm` | bfloat16 "))
    assert line.endswith("| verified, NVIDIA H100, 2026-01-02; failed, NVIDIA A100, 2026-01-02 |")
    assert len([line for line in lines if "| unverified |" in line]) == len(list(hardware.combinations())) - 1


def test_the_operations_are_those_the_library_registers() -> None:
    assert set(hardware.BOUND) == set(BOUND)
    source = (ROOT / "cuda_ext" / "bind_cuda.cpp").read_text()
    assert set(hardware.BOUND) == set(re.findall(r'm\.impl\("(\w+)"', source))


def test_the_documented_table_is_the_committed_results() -> None:
    import setup_ext

    page = (ROOT / "cuda_ext" / "README.md").read_text()
    found = re.search(r"<!-- hardware: [^>]*-->\n(.*)<!-- end of hardware -->", page, re.DOTALL)
    assert found is not None
    wanted = hardware.render(setup_ext.cuda_kernels().sources_digest(), hardware.committed())
    assert found[1] == wanted, "run: make readme"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A library built for sm_90a on a device of capability 9.0, neither of which exists."""
    entry = {"architectures": ["90a"], "sources": "abc"}
    monkeypatch.delenv(cuda.VARIABLE, raising=False)
    monkeypatch.setattr(cuda, "_loaded", lambda: entry)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda.serves.cache_clear()
    yield entry
    cuda.serves.cache_clear()


def test_unverified_kernels_are_not_chosen(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "committed", lambda: tuple(results({})))
    assert cuda.serves("rms_norm", torch.bfloat16, None, 0)
    assert not cuda.serves("rms_norm", torch.float16, None, 0)
    gpu["sources"] = "later"
    cuda.serves.cache_clear()
    assert not cuda.serves("rms_norm", torch.bfloat16, None, 0)


def test_nothing_is_chosen_or_loaded_without_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "committed", tuple)
    monkeypatch.setattr(cuda, "_loaded", lambda: pytest.fail("loaded"))
    monkeypatch.delenv(cuda.VARIABLE, raising=False)
    cuda.serves.cache_clear()
    for what in hardware.combinations():
        cached = None if what.cache_dtype is None else getattr(torch, what.cache_dtype)
        assert not cuda.serves(what.op, getattr(torch, what.dtype), cached, 0)
    cuda.serves.cache_clear()


def test_the_variable(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "committed", tuple)
    monkeypatch.setenv(cuda.VARIABLE, "all")
    assert cuda.serves("paged_attention", torch.bfloat16, torch.float8_e5m2, 0)
    assert not cuda.serves("paged_attention", torch.float32, torch.float8_e5m2, 0), "there is no such kernel"
    assert cuda.serves("copy_blocks", torch.bfloat16, torch.bfloat16, 0)
    assert not cuda.serves("copy_blocks", torch.bfloat16, torch.float16, 0), "a copy has one dtype"
    gpu["architectures"] = ["80"]
    cuda.serves.cache_clear()
    assert not cuda.serves("rms_norm", torch.bfloat16, None, 0), "no code for this device"
    monkeypatch.setenv(cuda.VARIABLE, "off")
    gpu["architectures"] = ["90"]
    cuda.serves.cache_clear()
    assert not cuda.serves("rms_norm", torch.bfloat16, None, 0)
    monkeypatch.setenv(cuda.VARIABLE, "some")
    cuda.serves.cache_clear()
    with pytest.raises(ConfigError, match="must be verified, all or off, is 'some'"):
        cuda.serves("rms_norm", torch.bfloat16, None, 0)


def test_which_devices_code_covers() -> None:
    assert cuda.covers(["80"], (8, 0))
    assert cuda.covers(["80"], (8, 9))
    assert not cuda.covers(["86"], (8, 0))
    assert not cuda.covers(["80"], (9, 0))
    assert cuda.covers(["80", "90a"], (9, 0))
    assert not cuda.covers(["90a"], (9, 1))
    assert not cuda.covers([], (9, 0))


def test_a_library_without_a_record_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "libaserve_cuda.so")
    for written in ((), ("libaserve_cuda.so",), ("libaserve_cuda.so", "build.json")):
        for name in written:
            (tmp_path / name).write_text('{"cpu": {}}')
        assert cuda._loaded.__wrapped__() is None
