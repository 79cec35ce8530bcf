"""Building, loading and choosing the native kernels."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from aserve import ops
from aserve.errors import ConfigError
from aserve.ops import native, packed
from tests.ops.conftest import ROOT, run_build


def test_a_second_build_does_nothing(built: Path) -> None:
    before = built.stat().st_mtime_ns
    done = run_build()
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stdout
    assert built.stat().st_mtime_ns == before
    record = json.loads((built.parent / "build.json").read_text())
    assert record["cpu"]["torch_target"].startswith("0x020b")


def test_only_stable_symbols_are_used(built: Path) -> None:
    done = run_build("--check")
    assert done.returncode == 0, done.stderr
    assert "all of the 2.11 stable ABI" in done.stdout


def test_the_check_refuses_other_symbols(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import setup_ext

    allowed = setup_ext.ALLOWED_SYMBOLS.read_text().split("\n")
    fewer = tmp_path / "symbols.txt"
    fewer.write_text("\n".join(line for line in allowed if line != "torch_get_num_threads"))
    monkeypatch.setattr(setup_ext, "ALLOWED_SYMBOLS", fewer)
    with pytest.raises(setup_ext.BuildError, match=r"stable ABI: torch_get_num_threads$"):
        setup_ext.check(built)


def test_kernels_do_not_leak_into_other_levels(built: Path) -> None:
    """A level's objects export their entry alone: shared inline code could be used below the level."""
    record = json.loads((built.parent / "build.json").read_text())
    objects = [name for name in record["cpu"]["objects"] if name.startswith("isa_")]
    entries = {level: f"{level}_kernels" for level in native.LEVELS} | {"avx512vnni": "quant_multiply_vnni"}
    assert len(objects) == len(entries)
    for name in objects:
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", "--extern-only", str(ROOT / "build" / "ext" / name)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        level = name.removeprefix("isa_").split("-")[0]
        names = [line.split(" ", 2)[2].split("(")[0] for line in listing]
        assert names == [f"aserve::{entries[level]}"]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"ASERVE_NO_EXT": "1"}, "ASERVE_NO_EXT=1 is set"), ({"CXX": "no-such-compiler"}, "no C++ compiler")],
)
def test_nothing_to_build_is_status_3_and_one_line(environment: dict[str, str], reason: str) -> None:
    done = run_build(**environment)
    assert done.returncode == 3
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_compile_error_is_status_1(built: Path, tmp_path: Path) -> None:
    """Also when a good library is there already, which stays."""
    copy = tmp_path / "project"
    shutil.copytree(ROOT / "cuda_ext", copy / "cuda_ext")
    shutil.copy(ROOT / "setup_ext.py", copy)
    (copy / "aserve").mkdir()
    (copy / "cuda_ext" / "cpu" / "copy.cpp").write_text("#error broken on purpose\n")
    done = subprocess.run(
        [sys.executable, str(copy / "setup_ext.py"), "--jobs", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": str(fake_compiler(tmp_path))},
        check=False,
    )
    assert done.returncode == 1
    assert "broken on purpose" in done.stderr
    assert not list((copy / "aserve").rglob("*.so"))


def fake_compiler(tmp_path: Path) -> Path:
    """g++ for copy.cpp, a quick pretence for the rest."""
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        '*copy.cpp*|--version) exec g++ "$@";;\n'
        '*) for last; do :; done; : > "$last";;\nesac\n'
    )
    script.chmod(0o755)
    return script


def in_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
        check=False,
    )


@pytest.mark.parametrize("level", ["avx2", "reference"])
def test_the_environment_forces_a_level(loaded: ModuleType, level: str) -> None:
    program = "from aserve import ops; print(ops.kernels()['isa'], ops.rms_norm.__module__)"
    done = in_python(program, ASERVE_CPU_ISA=level)
    module = "reference" if level == "reference" else "native"
    assert done.stdout.split() == [level, f"aserve.ops.{module}"], done.stderr


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.LEVEL_VARIABLE, "sse")
    with pytest.raises(ConfigError, match="must be auto, reference, avx2 or avx512, is 'sse'"):
        native.load()


def test_a_level_the_cpu_lacks_is_refused(loaded: ModuleType) -> None:
    with pytest.raises(ConfigError, match="'vector-9000'"):
        native.select("vector-9000")


def test_a_missing_library_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(native.LEVEL_VARIABLE, raising=False)
    monkeypatch.setattr(native, "_library", None)
    for content, reason in ((None, "it has not been built"), (b"not a library", "file too short")):
        path = tmp_path / f"lib{reason[:2]}.so"
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setattr(native, "LIBRARY", path)
        for cached in (native.why_missing, native.report, native._open):
            cached.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="aserve"):
            assert native.load() == "reference"
            assert native.report()["paged_attention"] == "reference"
            assert native.report()["isa"] == "reference"
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 1
        assert "python setup_ext.py" in lines[0]
        assert reason in lines[0]
    for cached in (native.why_missing, native.report, native._open):
        cached.cache_clear()


STALE = "".join(
    f"long {name}(void) {{ return 0; }}\n"
    for name in ("aserve_cpu_isa", "aserve_cpu_select", "aserve_packed_bytes", "aserve_decoder_bytes")
)


def test_a_library_of_other_sources_is_said(built: Path, tmp_path: Path) -> None:
    """One that loads, but has not all the operations."""
    (tmp_path / "stale.c").write_text(STALE)
    library = tmp_path / "libstale.so"
    compiler = ["g++", "-x", "c", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "stale.c")]
    subprocess.run(compiler, check=True)
    done = in_python(
        "from pathlib import Path; from aserve.ops import native\n"
        f"native.LIBRARY = Path({str(library)!r})\nprint(native.why_missing())",
        ASERVE_CPU_ISA="reference",
    )
    assert "it was built from other sources" in done.stdout, done.stderr


def test_the_report_names_every_operation(loaded: ModuleType) -> None:
    native.report.cache_clear()
    report = native.report()
    assert report.pop("isa") in native.LEVELS
    assert set(report.values()) == {"native"}
    assert set(report) == set(ops.__all__) - {"kernels", "samples"}


def arguments() -> dict[str, tuple[Any, ...]]:
    x, weight, cos_sin = torch.randn(2, 16), torch.ones(16), torch.randn(9, 8)
    heads, cache = torch.randn(2, 2, 8), torch.randn(3, 2, 8, 8)
    slots, int32 = torch.tensor([0, 9]), torch.int32
    lengths = torch.tensor([0, 1, 2], dtype=int32), torch.tensor([1, 9], dtype=int32)
    tables = torch.tensor([[0, 1], [1, 2]], dtype=int32)
    return {
        "rms_norm": (x, weight, 1e-5, x.clone()),
        "fused_add_rms_norm": (x, x.clone(), weight, 1e-5, x.clone(), x.clone()),
        "rotary_embedding": (
            heads,
            heads,
            slots,
            cos_sin[:, :4].repeat(2, 1),
            False,
            heads.clone(),
            heads.clone(),
        ),
        "rope_and_store": (
            *(heads, heads.clone(), heads.clone(), slots, torch.randn(10, 8), False),
            *(cache, cache.clone(), slots, 1.0, 1.0, heads.clone()),
        ),
        "store_kv": (heads, heads.clone(), cache, cache.clone(), slots, 1.0, 1.0),
        "paged_attention": (
            *(heads, cache, cache.clone(), *lengths, tables, 0.3, 0, 0.0, torch.ones(2)),
            *(1.0, 1.0, 1, heads.clone()),
        ),
        **decoder_arguments(),
        "gated": (x, 0, x[:, :8].clone()),
        "copy_blocks": ([cache, cache.clone()], torch.tensor([[0, 1]])),
        "swap_blocks": ([cache], [cache.clone()], torch.tensor([[0, 1]])),
        "pack_dense": (x, packed.allocate(16 * 64)),
        "pack_gguf": (
            *(torch.zeros(5 * 34, dtype=torch.uint8), packed.FORMATS["q8_0"], 5, 32),
            *(torch.arange(5), packed.allocate(576)),
        ),
        "packed_linear": (x, packed.allocate(16 * 64), weight[:5], 0, 5, 16, torch.randn(2, 5)),
        "packed_rows": (slots[:1], packed.allocate(16 * 64), 0, 5, 16, torch.randn(1, 16)),
        "penalties": (
            *(x.clone(), torch.tensor([0, 1, 2]), slots, torch.ones(2, dtype=int32)),
            *(torch.ones(2), torch.ones(2), torch.ones(2)),
        ),
        "sample": (x, torch.ones(2), slots, slots, slots.clone(), torch.zeros(2)),
        "greedy_allowed": (
            x,
            torch.ones(2, 1, dtype=int32),
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(2),
        ),
        "greedy_logprob": (x, torch.zeros(2, dtype=torch.int64), torch.zeros(2)),
    }


KEPT: list[torch.Tensor] = []  # what a description points into


def decoder_arguments() -> dict[str, tuple[Any, ...]]:
    """A description of one layer of width 16, with one head."""
    library = native.library()
    norm, matrix, table = torch.ones(16), packed.allocate(16 * 64), torch.ones(9, 16)
    cache, values = torch.zeros(4, 1, 4, 16), torch.zeros(4, 1, 4, 16)
    KEPT.extend((norm, matrix, table, cache, values))
    description = torch.zeros(library.functions.aserve_decoder_bytes(1), dtype=torch.uint8)
    stack = (description, 1, 1, 1, 16, norm, 1e-6)
    weight = (description, 0, 6, matrix, norm, 0, 16, 16)
    layer = (description, 0, norm, norm, norm, norm, norm, norm, table, False, 0.3, 0, 0.0, 0, 1e-6)
    library.decoder_stack(*stack)
    for which in range(7):
        library.decoder_weight(description, 0, which, matrix, None, 0, 16, 16)
    library.decoder_layer(*layer)
    library.decoder_cache(description, 0, cache, values)
    lengths = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    rows = (*lengths, torch.zeros(1, 1, dtype=torch.int32))
    slots = torch.tensor([0, 1])
    library.decoder_ends(description, matrix, 0, 2.0, matrix, 0, 16)
    tokens, blocks = torch.zeros(2, 6, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)
    floats = (torch.zeros(1, 16), torch.zeros(1, 16), torch.zeros(1, 16))
    inputs = (torch.tensor([1]), torch.tensor([2]), torch.tensor([-1]), torch.tensor([-1]), 0, 1.0)
    one = (*inputs, *floats, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), torch.tensor([0]))
    return {
        "decoder_ends": (description, matrix, 0, 2.0, matrix, 0, 16),
        "decoder_greedy": (description, tokens, blocks, *one),
        "decoder_stack": tuple(x.clone() if x is description else x for x in stack),
        "decoder_weight": weight,
        "decoder_layer": layer,
        "decoder_cache": (description, 0, cache, values),
        "decoder_forward": (description, torch.randn(2, 16), slots, *rows, slots.clone(), torch.randn(2, 16)),
    }


@pytest.mark.parametrize("name", native._KERNELS)
def test_schemas_and_fakes(loaded: ModuleType, name: str) -> None:
    """The schema says what is written, and the fake stands in when torch traces."""
    operation = getattr(torch.ops.aserve, name).default
    checks = ("test_schema", "test_faketensor")
    done = torch.library.opcheck(operation, arguments()[name], test_utils=checks)
    assert done == dict.fromkeys(checks, "SUCCESS")
