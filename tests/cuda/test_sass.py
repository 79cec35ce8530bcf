"""Reading machine code, and what is refused of it. The kernels' own code is checked by `make cuda`."""

from __future__ import annotations

import sys
from collections import Counter
from types import ModuleType

import pytest

from tests.cuda.conftest import ROOT

DUMP = """
arch = sm_80
		Function : _Z1a
        /*0000*/                   MOV R1, c[0x0][0x28] ;                    /* 0x00000a00ff017624 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;          /* 0x0000000402048981 */
        /*12340*/                  HMMA.16816.F32.BF16 R8, R4, R6, R8 ;      /* 0x0000000604087c3c */
arch = sm_90a
		Function : _Z1a
        /*0000*/             @UP2  STL [R1+0x8], R4 ;                        /* 0x0000080401007387 */
"""


@pytest.fixture(scope="module")
def sass() -> ModuleType:
    sys.path.insert(0, str(ROOT / "cuda_ext" / "cuda"))
    try:
        import sass
    finally:
        sys.path.pop(0)
    return sass


def test_reading(sass: ModuleType) -> None:
    found = [(k.name, k.arch, dict(k.opcodes)) for k in sass.kernels(DUMP.splitlines())]
    assert found == [
        ("_Z1a", "sm_80", {"MOV": 1, "LDG.E.128.CONSTANT": 1, "HMMA.16816.F32.BF16": 1}),
        ("_Z1a", "sm_90a", {"STL": 1}),
    ]


GOOD = {
    "prefill_kernel<__nv_bfloat16, __nv_bfloat16, 64>(A)": [
        "HMMA.16816.F32.BF16",
        "LDGSTS.E.BYPASS.128",
        "LDSM.16.M88.4",
    ],
    "decode_tensor_kernel<__half, __nv_fp8_e4m3, 64>(A)": [
        "HMMA.16816.F32",
        "LDGSTS.E.BYPASS.128.ZFILL",
        "LDSM.16.MT88.4",
    ],
    "decode_simple_kernel<__half, __half, 64, 4>(A)": ["LDG.E.128"],
    "decode_simple_kernel<__half, __nv_fp8_e5m2, 64, 4>(A)": ["LDG.E.64.CONSTANT"],
    "rotary_kernel<float, float, 4>(A)": ["LDG.E.128.CONSTANT", "STG.E.128"],
    "copy_kernel<uint4>(A)": ["LDG.E.128", "STG.E.128"],
    "choose_kernel(A)": ["EXIT"],
}


@pytest.mark.parametrize("name", GOOD)
def test_each_instruction_is_needed(sass: ModuleType, name: str) -> None:
    codes = GOOD[name]
    assert sass.faults(name, Counter(codes)) == []
    for left_out in codes:
        assert sass.faults(name, Counter(code for code in codes if code != left_out))
    assert sass.faults(name, Counter([*codes, "LDL.64"])) == ["1 LDL.64"]
    assert sass.faults(name, Counter([*codes, "STL"])) == ["1 STL"]


def test_narrow_loads_and_the_wrong_type_are_refused(sass: ModuleType) -> None:
    name = "decode_simple_kernel<__half, __half, 64, 4>(A)"
    assert sass.faults(name, Counter(["LDG.E.64", "STG.E.128"]))
    name = "prefill_kernel<__half, __half, 64>(A)"
    assert sass.faults(name, Counter(["HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4"]))


def test_a_kernel_nobody_listed_is_refused(sass: ModuleType) -> None:
    assert sass.faults("new_kernel<float>(A)", Counter(["EXIT"])) == [
        "nothing is expected of it here: EXPECTED lacks it"
    ]


def test_an_architecture_without_code_is_refused(sass: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASERVE_CUDA_ARCH", "80;90a")
    only = [sass.Kernel("choose_kernel", "sm_80", Counter(["EXIT"]))]
    with pytest.raises(sass.build.BuildError, match="code was found for"):
        sass.check(only, verbose=False)


LOG = """
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""


@pytest.mark.parametrize("numbers", [(8, 0, 0), (0, 4, 0), (0, 0, 4)])
def test_spilled_registers_and_stack_are_refused(sass: ModuleType, numbers: tuple[int, int, int]) -> None:
    sass.build.check([LOG.format(stack=0, stores=0, loads=0)], verbose=False)
    stack, stores, loads = numbers
    with pytest.raises(sass.build.BuildError, match=f"{stores + loads} bytes spilled, {stack} of stack"):
        sass.build.check([LOG.format(stack=stack, stores=stores, loads=loads)], verbose=False)


def test_a_log_without_kernels_is_refused(sass: ModuleType) -> None:
    with pytest.raises(sass.build.BuildError, match="no kernel"):
        sass.build.check([""], verbose=False)
