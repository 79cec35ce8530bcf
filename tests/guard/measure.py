"""Counts instructions and compares them with ``figures.json``: ``python -m tests.guard.measure [--renew]``.

Seconds depend on the day, instructions do not. The kernels are stepped through one by one at every level
the CPU has; the Python of a step is counted by callgrind. A count may be MARGIN above its figure. When a
change is meant to cost more, or has become cheaper, renew the figures and commit them with it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import setup_ext
from tests.guard import engine

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FIGURES = HERE / "figures.json"
MARGIN = 1.05
RENEW = "python -m tests.guard.measure --renew"
NO_LEVEL = 3
CANNOT_COUNT = 3

Counts = dict[str, int]


class CannotCountError(Exception):
    """Something this machine lacks; the message says what."""


def compiler() -> str:
    """The compiler the kernels' counts belong to: name and major version."""
    try:
        tools = setup_ext.find_toolchain()
    except setup_ext.NothingToBuildError as error:
        raise CannotCountError(str(error)) from error
    major = subprocess.run([tools.compiler, "-dumpversion"], capture_output=True, text=True, check=True)
    return f"{Path(tools.compiler).name} {major.stdout.strip().split('.')[0]}"


def kernels(folder: Path) -> Counts:
    """Instructions of each kernel of each level this CPU has, keyed ``level: case``."""
    setup_ext.build(1)
    tools = setup_ext.find_toolchain()
    program = folder / "kernels"
    objects = [str(path) for path in setup_ext.objects(tools) if not path.name.startswith("bind_")]
    source = [str(HERE / "kernels.cpp"), f"-I{setup_ext.SOURCES / 'cpu'}"]
    setup_ext.run([tools.compiler, "-std=c++20", "-O1", *source, *objects, "-pthread", "-o", str(program)])
    found: Counts = {}
    for level in setup_ext.LEVEL_FLAGS:
        done = subprocess.run([program, level], capture_output=True, text=True, check=False)
        if done.returncode == NO_LEVEL:
            continue
        if done.returncode != 0:
            raise CannotCountError(f"{level}: status {done.returncode}: {done.stderr.strip()}")
        for line in done.stdout.splitlines():
            case, _, count = line.rpartition(" ")
            found[f"{level}: {case}"] = int(count)
    return found


def python(folder: Path) -> Counts:
    """Instructions of the engine per token and per request, callgrind's."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise CannotCountError("valgrind is not installed")
    library = folder / "requests.so"
    tools = setup_ext.find_toolchain()
    # gcc beside g++ and clang beside clang++; the file is C.
    setup_ext.run(
        [tools.compiler, "-x", "c", "-shared", "-fPIC", str(HERE / "requests.c"), "-o", str(library)]
    )
    pattern = folder / "callgrind.out"
    command = [valgrind, "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={pattern}"]
    environment = os.environ | {
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "ASERVE_CPU_ISA": "reference",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.guard.engine", str(library)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    if done.returncode != 0:
        raise CannotCountError(f"the engine under callgrind: {done.stderr[-2000:]}")
    totals = {}
    for path in folder.glob("callgrind.out.*"):
        text = path.read_text(errors="replace")
        name = re.search(r"^desc: Trigger: Client Request: (\w+)$", text, re.MULTILINE)
        total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
        if name and total:
            totals[name[1]] = int(total[1])
    if set(totals) != {"short", "long"}:
        raise CannotCountError(f"callgrind wrote no counts: {done.stderr[-500:]}")
    per_token = (totals["long"] - totals["short"]) / (engine.REQUESTS * (engine.LONG - engine.SHORT))
    per_request = totals["short"] / engine.REQUESTS - per_token * engine.SHORT
    return {"engine, a token": round(per_token), "engine, a request": round(per_request)}


def compare(found: Counts, figures: Counts) -> list[str]:
    """What has become worse: one line each. Cases of levels this CPU lacks are not missed."""
    levels = {name.partition(":")[0] for name in found}
    problems = []
    for name, figure in figures.items():
        if name not in found:
            if name.partition(":")[0] in levels:
                problems.append(f"{name}: has a figure and is no longer counted")
        elif found[name] > figure * MARGIN:
            problems.append(
                f"{name}: {found[name]} instructions, {found[name] / figure - 1:+.1%} of {figure}"
            )
    problems += [f"{name}: counted, but has no figure" for name in found if name not in figures]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--renew", action="store_true", help=f"write {FIGURES.name} from what is counted now")
    parser.add_argument("--only", choices=["kernels", "python"], help="count these alone")
    options = parser.parse_args()
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        for kind, counter in (("kernels", kernels), ("python", python)):
            if options.only not in (None, kind):
                continue
            try:
                key = (
                    compiler() if kind == "kernels" else f"python {sys.version_info[0]}.{sys.version_info[1]}"
                )
                known = figures.get(kind, {}).get(key)
                if known is None and not options.renew:
                    print(f"{kind}: no figures for {key}; only {', '.join(figures.get(kind, {})) or 'none'}")
                    continue
                found = counter(Path(name))
            except CannotCountError as error:
                print(f"{kind}: cannot be counted here: {error}", file=sys.stderr)
                return CANNOT_COUNT
            for case, count in found.items():
                before = f"{count / known[case] - 1:+.1%}" if known and case in known else "new"
                print(f"{case:<44}{count:>10}  {before}", flush=True)
            if options.renew:
                figures.setdefault(kind, {})[key] = found
            else:
                problems += compare(found, known or {})
    if options.renew:
        FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
        print(f"written: {FIGURES.relative_to(ROOT)}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"if this is meant, renew the figures and commit them: {RENEW}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
