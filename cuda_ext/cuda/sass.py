#!/usr/bin/env python3
"""Checks the machine code of the CUDA kernels: ``python cuda_ext/cuda/sass.py [--verbose]``.

Compiles what is missing, has cuobjdump write out the code of every kernel and architecture, and fails where a
kernel lacks an instruction it was written for (see EXPECTED) or uses local memory: registers spilled, or
arrays whose index the compiler did not know. Says nothing of speed and nothing of correctness.

cuobjdump is CUDA's and needs nvdisasm beside it; without a toolkit that has both, the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm do. Exit status: 0 as written; 1 not; 3 nothing can be
checked here.

Environment: ``CUOBJDUMP``, and those of build.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import build

PACKAGES = build.OUTPUT / "tools" / "nvidia" / "cu13" / "bin"

WIDE_LOAD, WIDE_STORE = r"LDG\.E\.(\w+\.)*128", r"STG\.E\.(\w+\.)*128"
MMA, WIDE_ASYNC, LDSM = r"HMMA\.16816\.F32", r"LDGSTS\.E\.(\w+\.)*128", r"LDSM\.16\.M"
LOCAL = r"(LDL|STL)\b"

# Instructions of the kernels whose name matches, the first that does; one that nothing matches is a mistake.
EXPECTED: list[tuple[str, list[str]]] = [
    (r"(decode_tensor|prefill)_kernel<__half,", [MMA + r"(?!\.BF16)", WIDE_ASYNC, LDSM]),
    (r"(decode_tensor|prefill)_kernel<__nv_bfloat16,", [MMA + r"\.BF16", WIDE_ASYNC, LDSM]),
    (r"decode_simple_kernel<\w+, __nv_fp8_\w+,", [r"LDG\.E\.(\w+\.)*64"]),  # a lane's 8 elements are 8 bytes
    (r"decode_simple_kernel<", [WIDE_LOAD]),
    (r"norm_kernel<.*__nv_fp8_e4m3, [48]>", [WIDE_LOAD]),  # 8-bit results are 4 or 8 bytes
    (r"norm_kernel<.*, [48]>", [WIDE_LOAD, WIDE_STORE]),
    (r"(activation|rotary)_kernel<.*, [48]>", [WIDE_LOAD, WIDE_STORE]),
    (r"copy_kernel<uint4>", [WIDE_LOAD, WIDE_STORE]),
    (r"copy_kernel<char>", []),
    (r"(norm|activation|rotary)_kernel<.*, 1>", []),  # for what is not aligned
    (r"(merge|sample|penalty|choose)_kernel", []),
]


@dataclass
class Kernel:
    name: str  # mangled
    arch: str
    opcodes: Counter[str] = field(default_factory=Counter)


def find_cuobjdump() -> str:
    named = os.environ.get("CUOBJDUMP")
    places = [named] if named else ["cuobjdump", str(Path(build.find_nvcc()).with_name("cuobjdump"))]
    if not named:
        places.append(str(PACKAGES / "cuobjdump"))
    found = next((path for path in map(shutil.which, places) if path), None)
    if found is None:
        raise build.NothingToBuildError(
            f"no cuobjdump: it is none of {', '.join(places)}; set CUOBJDUMP, or install the packages "
            "nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm"
        )
    return found


def kernels(lines: Iterable[str]) -> Iterator[Kernel]:
    """What cuobjdump --dump-sass writes, one entry a kernel and architecture."""
    arch, now = "", None
    for line in lines:
        if match := re.search(r"\barch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            if now is not None:
                yield now
            now = Kernel(match[1], arch)
        elif now is not None and (match := re.search(r"/\*[0-9a-f]{4,5}\*/ +(@!?\w+ +)?([A-Z][\w.]*)", line)):
            now.opcodes[match[2]] += 1
    if now is not None:
        yield now


def faults(name: str, opcodes: Counter[str]) -> list[str]:
    """What is wrong with a kernel's instructions; `name` is demangled."""
    wanted = next((wanted for pattern, wanted in EXPECTED if re.match(pattern, name)), None)
    if wanted is None:
        return ["nothing is expected of it here: EXPECTED lacks it"]
    missing = [f"no {want}" for want in wanted if not any(re.match(want, code) for code in opcodes)]
    local = sorted(code for code in opcodes if re.match(LOCAL, code))
    if not opcodes:
        missing.append("no instruction was read")
    return missing + [f"{opcodes[code]} {code}" for code in local]


def check(found: list[Kernel], verbose: bool) -> None:
    archs = {f"sm_{arch}" for arch in build.architectures()}
    if {kernel.arch for kernel in found} != archs:
        raise build.BuildError(f"code was found for {sorted({k.arch for k in found})}, not {sorted(archs)}")
    wrong, seen = [], Counter[str]()
    for kernel, name in zip(found, build.demangle([kernel.name for kernel in found]), strict=True):
        seen += kernel.opcodes
        wrong += [f"{kernel.arch} {name}: {fault}" for fault in faults(name, kernel.opcodes)]
        if verbose:
            kept = {c: n for c, n in sorted(kernel.opcodes.items()) if re.match("HMMA|LDG|STG|LDSM", c)}
            print(kernel.arch, name, kept)
    if wrong:
        raise build.BuildError("\n".join(wrong))
    mma = sum(count for code, count in seen.items() if code.startswith("HMMA"))
    print(f"{len(found)} kernels' machine code: {mma} tensor-core instructions, wide loads, no local memory")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--verbose", action="store_true", help="print every kernel's loads, stores and mma")
    options = parser.parse_args(arguments)
    try:
        tool = find_cuobjdump()
        library, _ = build.build("cuda", [], int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
        dump = subprocess.Popen([tool, "--dump-sass", str(library)], stdout=subprocess.PIPE, text=True)
        found = list(kernels(dump.stdout or ()))
        if dump.wait() != 0:
            raise build.BuildError(f"{tool} failed with status {dump.returncode}")
        check(found, options.verbose)
    except build.NothingToBuildError as reason:
        print(f"nothing checked: {reason}", file=sys.stderr)
        return int(build.NOTHING)
    except build.BuildError as error:
        print(error, file=sys.stderr)
        return int(build.FAILED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
