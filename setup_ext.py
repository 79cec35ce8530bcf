#!/usr/bin/env python3
"""Builds the native extension in place: ``python setup_ext.py``.

Run it with the interpreter that runs aserve, after torch is installed there: the binding needs torch's
headers and libraries (its stable ABI only, so one build serves every later torch). Writes
``aserve/_lib/libaserve_cpu.so`` and ``aserve/_lib/build.json``. Nothing is downloaded or installed.

The CUDA kernels take minutes and are compiled only when asked for: by ``--target cuda`` (or ``all``), or by
naming architectures in ``ASERVE_CUDA_ARCH``, such as ``80;90a``. That needs nvcc and no GPU, and writes
``aserve/_lib/libaserve_cuda.so``.

Exit status: 0 built or up to date; 3 nothing can be built here (aserve then runs on its torch references);
1 the compiler or the check failed; 2 wrong usage.

Environment: ``ASERVE_NO_EXT=1`` builds nothing; ``MAX_JOBS`` is the default of ``--jobs``; ``CXX`` names
the C++ compiler (g++ or clang++); ``ASERVE_CUDA_ARCH``; ``NVCC`` or ``CUDA_HOME``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "cuda_ext"
LIBRARY_DIR = ROOT / "aserve" / "_lib"
OBJECT_DIR = ROOT / "build" / "ext"
ALLOWED_SYMBOLS = SOURCES / "stable_symbols.txt"

BUILT, FAILED, NOTHING = 0, 1, 3

# The oldest torch the library must load in: 2.11, as torch's own version headers encode it.
TORCH_TARGET = "0x020b000000000000ULL"

COMMON_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Products and sums are fused where the source says so and nowhere else: a kernel's paths must agree.
KERNEL_FLAGS = [
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-unused-function",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",  # of the registers left undefined in gcc's own intrinsics
]
LEVEL_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
    ],
}
BINDINGS = ("cpu", "decoder", "linear")  # of the CPU library; bind_cuda.cpp is the CUDA library's
LEVEL_FLAGS["avx512vnni"] = [*LEVEL_FLAGS["avx512"], "-mavx512vnni"]  # chosen inside the level avx512


class NothingToBuildError(Exception):
    """This machine or environment cannot build; the message says why."""


class BuildError(Exception):
    """The compiler, the linker or the check refused; the message is its output."""


@dataclass(frozen=True)
class Toolchain:
    compiler: str
    version: str
    torch: Path
    torch_version: str


@dataclass(frozen=True)
class Unit:
    source: Path
    flags: tuple[str, ...]


def find_toolchain() -> Toolchain:
    if os.environ.get("ASERVE_NO_EXT") == "1":
        raise NothingToBuildError("ASERVE_NO_EXT=1 is set")
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"):
        raise NothingToBuildError(
            f"there are native kernels for x86-64 Linux only, this is {sys.platform} {machine}"
        )
    named = os.environ.get("CXX")
    found = shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise NothingToBuildError(f"no C++ compiler: {named or 'neither g++ nor clang++'} is not on the path")
    torch, torch_version = find_torch()
    version = subprocess.run(
        [found, "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    return Toolchain(found, version, torch, torch_version)


def find_torch() -> tuple[Path, str]:
    """The directory and version of this interpreter's torch, without the seconds of importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NothingToBuildError(
            f"torch is not installed for {sys.executable}; install it, then run this again"
        )
    directory = Path(spec.origin).parent
    match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (directory / "version.py").read_text())
    if match is None:
        raise NothingToBuildError(f"cannot read torch's version in {directory}")
    major, minor = (int(part) for part in match[1].split(".")[:2])
    if (major, minor) < (2, 11):
        raise NothingToBuildError(f"torch 2.11 or later is needed, {match[1]} is installed")
    return directory, match[1]


def units(tools: Toolchain) -> list[Unit]:
    cpu = SOURCES / "cpu"
    levels = [
        Unit(cpu / f"isa_{level}.cpp", tuple(COMMON_FLAGS + KERNEL_FLAGS + flags))
        for level, flags in LEVEL_FLAGS.items()
    ]
    plain = tuple([*COMMON_FLAGS, "-O2"])
    include = str(tools.torch / "include")
    binding = (*plain, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", include)
    return [
        *levels,
        *(Unit(SOURCES / f"bind_{name}.cpp", binding) for name in BINDINGS),
        *(Unit(source, plain) for source in sorted(cpu.glob("*.cpp")) if not source.name.startswith("isa_")),
    ]


def link_flags(tools: Toolchain) -> list[str]:
    # The torch libraries are already loaded when this one is, so no path to them is recorded. Without
    # naming libtorch_cpu its symbols would not be found: Python loads torch's libraries locally.
    libraries = ["-Wl,--no-as-needed", f"-L{tools.torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    return ["-shared", "-Wl,-z,defs", *libraries, "-lm"]


def digest(*parts: str | bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def headers_digest(binding: bool) -> str:
    """Of the headers that a kernel, or a binding, may include."""
    folders = [SOURCES / "cpu", *([SOURCES] if binding else [])]
    files = sorted(p for folder in folders for p in folder.glob("*") if p.suffix in (".h", ".inl"))
    return digest(*(part for p in files for part in (p.name, p.read_bytes())))


def compile_unit(tools: Toolchain, unit: Unit, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{target.name}.{os.getpid()}")
    run([tools.compiler, *unit.flags, "-c", str(unit.source), "-o", str(aside)])
    aside.replace(target)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr, end="")
    return done.stdout


def objects(tools: Toolchain) -> dict[Path, Unit]:
    """Every object file of the library, built or not, with what it is made from."""
    headers, found = {binding: headers_digest(binding) for binding in (False, True)}, {}
    for unit in units(tools):
        shared = headers[unit.source.parent == SOURCES]
        key = digest(unit.source.read_bytes(), shared, *unit.flags, tools.version, tools.torch_version)
        found[OBJECT_DIR / f"{unit.source.stem}-{key[:20]}.o"] = unit
    return found


def read_record() -> dict[str, Any]:
    """What each library was built from, as far as it has been built."""
    record = LIBRARY_DIR / "build.json"
    return dict(json.loads(record.read_text())) if record.exists() else {}


def write_record(name: str, state: dict[str, Any]) -> None:
    record = LIBRARY_DIR / "build.json"
    aside = record.with_name(f"{record.name}.{os.getpid()}")
    aside.write_text(json.dumps({**read_record(), name: state}, indent=2) + "\n")
    aside.replace(record)


def build(jobs: int) -> Path:
    """Compiles what changed and links. Returns the library's path."""
    tools = find_toolchain()
    wanted = objects(tools)
    link = link_flags(tools)
    state = {
        "objects": sorted(path.name for path in wanted),
        "link": link,
        "compiler": tools.version,
        "torch": tools.torch_version,
        "torch_target": TORCH_TARGET,
        "levels": list(LEVEL_FLAGS),
    }
    library = LIBRARY_DIR / "libaserve_cpu.so"
    if library.exists() and read_record().get("cpu") == state:
        print(f"{library.relative_to(ROOT)} is up to date")
        return library
    missing = [(path, unit) for path, unit in wanted.items() if not path.exists()]
    started = time.monotonic()
    with ThreadPoolExecutor(max(1, min(jobs, len(missing)))) as pool:
        list(pool.map(lambda item: compile_unit(tools, item[1], item[0]), missing))
    LIBRARY_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=LIBRARY_DIR) as aside:
        fresh = Path(aside) / library.name
        run([tools.compiler, "-o", str(fresh), *(str(path) for path in wanted), *link])
        fresh.replace(library)
    write_record("cpu", state)
    seconds = time.monotonic() - started
    print(f"built {library.relative_to(ROOT)} ({len(missing)} files compiled, {seconds:.1f} s)")
    return library


def cuda_kernels() -> ModuleType:
    """The builder of the CUDA kernels, cuda_ext/cuda/build.py."""
    spec = importlib.util.spec_from_file_location("cuda_kernels", SOURCES / "cuda" / "build.py")
    if spec is None or spec.loader is None:
        raise BuildError("cuda_ext/cuda/build.py cannot be read")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def build_cuda(jobs: int) -> Path:
    """Compiles the CUDA kernels and their binding where something changed, and links. Returns the library."""
    tools, kernels = find_toolchain(), cuda_kernels()
    try:
        made = kernels.compile_all("cuda", [], jobs)
    except kernels.NothingToBuildError as reason:
        raise NothingToBuildError(str(reason)) from None
    except kernels.BuildError as error:
        raise BuildError(str(error)) from None
    # Through nvcc, which knows where its own headers are. CUDA's runtime is linked in, and loads the driver
    # when it is first called: the library must load where there is none.
    flags = ["-std=c++20", "-O2", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", str(tools.torch / "include")]
    source = SOURCES / "bind_cuda.cpp"
    key = digest(
        source.read_bytes(), kernels.sources_digest(), headers_digest(True), *flags, tools.torch_version
    )
    binding = OBJECT_DIR / f"bind_cuda-{key[:20]}.o"
    link = [*made.link, "-Xlinker", "-z,defs,--no-as-needed", f"-L{tools.torch / 'lib'}"]
    link += ["-ltorch", "-ltorch_cpu", "-lc10"]
    state = {
        "objects": sorted(path.name for path in (*made.objects, binding)),
        "architectures": kernels.architectures(),
        "sources": kernels.sources_digest(),
        "link": link,
        "torch": tools.torch_version,
        "torch_target": TORCH_TARGET,
    }
    library = LIBRARY_DIR / "libaserve_cuda.so"
    if library.exists() and read_record().get("cuda") == state:
        print(f"{library.relative_to(ROOT)} is up to date")
        return library
    if not binding.exists():
        nvcc = Toolchain(made.compiler, "", tools.torch, tools.torch_version)
        compile_unit(nvcc, Unit(source, tuple(flags)), binding)
    LIBRARY_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=LIBRARY_DIR) as aside:
        fresh = Path(aside) / library.name
        run([made.compiler, "-o", str(fresh), *(str(path) for path in made.objects), str(binding), *link])
        fresh.replace(library)
    write_record("cuda", state)
    print(f"built {library.relative_to(ROOT)} for {', '.join(state['architectures'])}")
    return library


def check(library: Path) -> None:
    """Refuses a library that needs anything of torch but the listed stable-ABI functions."""
    allowed = {line for line in ALLOWED_SYMBOLS.read_text().split("\n") if line and not line.startswith("#")}
    listing = run(["nm", "-D", "--undefined-only", str(library)])
    needed = {line.split()[-1].split("@")[0] for line in listing.splitlines() if line.strip()}
    of_torch = {s for s in needed if s.startswith(("torch_", "aoti_"))}
    # Names mangled in torch's C++ namespaces, which have no stable ABI.
    unstable = {s for s in needed if re.match(r"_Z.*(2at|3c10|5torch|5caffe2)\d", s)}
    strays = sorted((of_torch - allowed) | unstable)
    if strays:
        raise BuildError("symbols outside torch's 2.11 stable ABI: " + ", ".join(strays))
    print(f"{library.name}: {len(of_torch)} torch symbols, all of the 2.11 stable ABI")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--target",
        choices=["auto", "cpu", "cuda", "all"],
        default="auto",
        help="what to build (default: auto, which is cpu, and cuda too where ASERVE_CUDA_ARCH is set)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1),
        help="compilers at a time (default: MAX_JOBS, else one a core)",
    )
    parser.add_argument("--check", action="store_true", help="then check the library's torch symbols")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    try:
        wanted = options.target
        libraries = [] if wanted == "cuda" else [build(options.jobs)]
        if wanted in ("cuda", "all") or (wanted == "auto" and os.environ.get("ASERVE_CUDA_ARCH")):
            libraries.append(build_cuda(options.jobs))
        if options.check:
            for library in libraries:
                check(library)
    except NothingToBuildError as reason:
        print(f"setup_ext: nothing built: {reason}", file=sys.stderr)
        return NOTHING
    except BuildError as error:
        print(f"setup_ext: {error}", file=sys.stderr)
        return FAILED
    return BUILT


if __name__ == "__main__":
    sys.exit(main())
