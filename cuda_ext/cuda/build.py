#!/usr/bin/env python3
"""Builds the CUDA kernels: ``python cuda_ext/cuda/build.py emulation|asan|cuda``.

emulation   the kernels through a C++20 compiler, to be run by tests on the CPU (see simt/simt.cuh)
asan        the same under AddressSanitizer and UndefinedBehaviorSanitizer
cuda        the kernels through nvcc for sm_80 and sm_90a; ``--check`` then fails on registers spilled

Prints the library's path as its last line. Objects are kept under ``build/cuda`` by a hash of what they are
made from. Exit status: 0 built; 3 nothing can be built here; 1 the compiler or the check refused.

Environment: ``CXX``; ``NVCC`` or ``CUDA_HOME``; ``MAX_JOBS``; ``ASERVE_CUDA_ARCH``, such as ``80;90a``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / "cuda"
BUILT, FAILED, NOTHING = 0, 1, 3
TARGETS = ("emulation", "asan", "cuda")

EMULATION_FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # of #pragma unroll
    "-fno-math-errno",
    "-fstack-clash-protection",  # so that a full stack meets its guard page
    "-ffp-contract=off",
]
SANITIZER_FLAGS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "-lineinfo"]


class NothingToBuildError(Exception):
    """This machine cannot build; the message says why."""


class BuildError(Exception):
    """The compiler or the check refused; the message is its output."""


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    spilled: int
    stack: int


def find_cxx() -> str:
    named = os.environ.get("CXX")
    found = shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise NothingToBuildError(f"no C++ compiler: {named or 'neither g++ nor clang++'} is not on the path")
    return found


def find_nvcc() -> str:
    named = os.environ.get("NVCC")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(named) if named else shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if found is None:
        raise NothingToBuildError(
            f"no nvcc: {named or f'it is neither on the path nor in {home}/bin'}; set NVCC or CUDA_HOME"
        )
    return found


def digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:20]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Compiled:
    """Object files, what links them, and what the compiler said of each."""

    compiler: str
    objects: list[Path]
    link: list[str]
    logs: list[str]


def sources_digest() -> str:
    """Of everything a kernel on a GPU is made from: what a result obtained there holds for."""
    binding = [ROOT / "cuda_ext" / name for name in ("bind_cuda.cpp", "arguments.h", "tensor_view.h")]
    files = [*HERE.glob("*.cu"), *HERE.rglob("*.cuh"), *binding]
    return digest(*(part for p in sorted(files) for part in (p.name.encode(), p.read_bytes())))


def architectures() -> list[str]:
    return [a for a in os.environ.get("ASERVE_CUDA_ARCH", "80;90a").split(";") if a]


def compile_all(target: str, extra: list[Path], jobs: int) -> Compiled:
    """Compiles what is missing."""
    kernels = sorted(HERE.glob("*.cu")) + extra
    if target == "cuda":
        compiler = find_nvcc()
        flags = list(NVCC_FLAGS)
        for arch in architectures():
            flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        sources, as_cpp, link = kernels, [], ["-shared", "-cudart", "static"]
    else:
        compiler = find_cxx()
        flags = EMULATION_FLAGS + (SANITIZER_FLAGS if target == "asan" else ["-O2"])
        sources = kernels + sorted((HERE / "simt").glob("*.cpp"))
        as_cpp, link = ["-x", "c++"], ["-shared"]
        if target == "asan":
            link.append("-fsanitize=address,undefined")
    headers = sorted(p for p in HERE.rglob("*") if p.suffix in (".cuh", ".h"))
    version = run([compiler, "--version"]).encode()
    common = [p.read_bytes() for p in headers] + [" ".join(flags).encode(), version]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    objects = {
        OUTPUT / f"{target}-{s.stem}-{digest(s.name.encode(), s.read_bytes(), *common)}.o": s for s in sources
    }

    def compile_one(item: tuple[Path, Path]) -> None:
        path, source = item
        aside = path.with_name(f"{path.name}.{os.getpid()}.o")
        begun = time.monotonic()
        said = run([compiler, *flags, "-I", str(HERE), *as_cpp, "-c", str(source), "-o", str(aside)])
        if target == "cuda":
            print(f"{source.name}: {time.monotonic() - begun:.1f} s")
        if said and target != "cuda":
            print(said, file=sys.stderr, end="")
        path.with_suffix(".log").write_text(said)
        aside.replace(path)

    missing = [item for item in objects.items() if not item[0].exists()]
    started = time.monotonic()
    with ThreadPoolExecutor(max(1, min(jobs, len(missing)))) as pool:
        list(pool.map(compile_one, missing))
    if missing:
        print(f"{target}: {len(missing)} files compiled in {time.monotonic() - started:.1f} s")
    logs = [path.with_suffix(".log") for path in objects]
    return Compiled(compiler, list(objects), link, [log.read_text() for log in logs if log.exists()])


def build(target: str, extra: list[Path], jobs: int) -> tuple[Path, list[str]]:
    """Compiles what is missing and links. Returns the library and what the compiler said of each object."""
    made = compile_all(target, extra, jobs)
    names = "\n".join(sorted(path.name for path in made.objects)).encode()
    library = OUTPUT / f"libaserve_{target}-{digest(names, ' '.join(made.link).encode())}.so"
    if not library.exists():
        aside = library.with_name(f"{library.name}.{os.getpid()}")
        run([made.compiler, "-o", str(aside), *(str(path) for path in made.objects), *made.link])
        aside.replace(library)
    return library, made.logs


def usages(logs: list[str]) -> list[Usage]:
    """ptxas's report, one entry a kernel and architecture."""
    found: list[Usage] = []
    for log in logs:
        kernel = arch = ""
        stack = spilled = 0
        for line in log.splitlines():
            if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
                kernel, arch = match[1], match[2]
            elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
                stack, spilled = int(match[1]), int(match[2]) + int(match[3])
            elif match := re.search(r"Used (\d+) registers", line):
                found.append(Usage(kernel, arch, int(match[1]), spilled, stack))
    return found


def check(logs: list[str], verbose: bool) -> None:
    """Refuses kernels whose registers ptxas spilled or that keep arrays in local memory."""
    seen = usages(logs)
    if not seen:
        raise BuildError("ptxas reported no kernel")
    names = dict(zip([u.kernel for u in seen], demangle([u.kernel for u in seen]), strict=True))
    if verbose:
        for usage in seen:
            print(f"{usage.arch} {usage.registers:3} registers  {names[usage.kernel]}")
    bad = [u for u in seen if u.spilled or u.stack]
    if bad:
        raise BuildError(
            "\n".join(
                f"{u.arch}: {u.spilled} bytes spilled, {u.stack} of stack: {names[u.kernel]}" for u in bad
            )
        )
    print(f"{len(seen)} kernels, at most {max(u.registers for u in seen)} registers, none spilled, no stack")


def demangle(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None or not names:
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [
        re.sub(r"aserve::cuda::|\(anonymous namespace\)::|void ", "", n) for n in done.stdout.splitlines()
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument(
        "--with", dest="extra", type=Path, action="append", default=[], help="a further .cu file"
    )
    parser.add_argument(
        "--check", action="store_true", help="cuda: fail on spilled registers and local memory"
    )
    parser.add_argument("--verbose", action="store_true", help="cuda: print every kernel's registers")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if (options.check or options.verbose) and options.target != "cuda":
        parser.error("--check and --verbose go with the target cuda")
    try:
        library, logs = build(options.target, options.extra, options.jobs)
        if options.check or options.verbose:
            check(logs, options.verbose)
    except NothingToBuildError as reason:
        print(f"nothing built: {reason}", file=sys.stderr)
        return NOTHING
    except BuildError as error:
        print(error, file=sys.stderr)
        return FAILED
    print(library)
    return BUILT


if __name__ == "__main__":
    sys.exit(main())
