"""The command ``aserve gpu-check``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from aserve.errors import AserveError, ConfigError

SECONDS = 540.0
OUTPUT = "build/gpu_check/results.jsonl"

DESCRIPTION = """Prove and time the CUDA kernels, and the engine on them, on the GPU at hand.
Findings go to a file as they come; a table of them and the counts are printed at the end. Exit status: 0 all
passed, 1 something failed or was left out for lack of time, 2 this cannot run here."""


def parser() -> argparse.ArgumentParser:
    from aserve.gpu_check.plan import NAMES

    parser = argparse.ArgumentParser(prog="aserve gpu-check", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--only", default="", metavar="PHASE[,PHASE]", help=f"Of {', '.join(NAMES)}. (default: all)"
    )
    parser.add_argument("--op", default="", metavar="OP[,OP]", help="Only these operations' cases.")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"What the whole run may take. (default: {SECONDS:g})"
    )
    parser.add_argument(
        "--output", default=OUTPUT, metavar="FILE", help=f"Results are added to it. (default: {OUTPUT})"
    )
    parser.add_argument("--seed", type=int, help="Of every input. (default: a fresh one)")
    parser.add_argument("--commit", help="Noted in the results. (default: what git says)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Go through everything on the CPU, with emulated kernels and tiny shapes. Verifies nothing.",
    )
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    begun = time.monotonic()
    options = parser().parse_args(argv)
    try:
        return check(options, begun)
    except AserveError as error:
        print(f"aserve gpu-check: {error}", file=sys.stderr)
        return 2


def check(options: argparse.Namespace, begun: float) -> int:
    from aserve.gpu_check import cases, children, plan, table
    from aserve.gpu_check.machine import Machine, open_machine
    from aserve.gpu_check.options import Options
    from aserve.gpu_check.results import Results

    only = _named("only", options.only, plan.NAMES)
    ops = _named("op", options.op, tuple(cases.OPERATIONS))
    if not options.seconds > 0:
        raise ConfigError(f"seconds must be above 0, got {options.seconds:g}", param="seconds")
    if options.seed is not None and options.seed < 0:
        raise ConfigError(f"seed must not be negative, got {options.seed}", param="seed")
    seed = int.from_bytes(os.urandom(3), "little") if options.seed is None else options.seed
    dry: bool = options.dry_run

    def opened() -> Machine:
        return open_machine(dry)

    if dry:
        from aserve.gpu_check import emulation

        emulation.build()
    # Not in this process: a device opened here would be of no use to its children.
    about = children.ask(lambda: opened().describe(), 60)
    about["commit"] = options.commit or _commit()
    results = Results(Path(options.output), about, dry)
    try:
        until = begun + options.seconds
        left_out = plan.run(plan.chosen(only), Options(dry, seed, ops), until, opened, results)
    finally:
        results.close()
    print(table.render(about, results.rows, left_out, dry))
    failed = any(row.get("passed") is False for row in results.rows)
    return 1 if failed or left_out else 0


def _named(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: unknown {name!r}; known: {', '.join(known)}", param=option)
    return names


def _commit() -> str:
    """The commit of the source tree, marked where files differ from it; "unknown" without git."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
