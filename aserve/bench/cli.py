"""The command ``aserve bench``."""

from __future__ import annotations

import importlib
import sys

from aserve.errors import ConfigError

COMMANDS = {
    "serve": "load a running server over HTTP: throughput and latency percentiles",
    "throughput": "generate for many prompts at once, in this process",
    "latency": "time one batch again and again, in this process",
    "limits": "what this machine can read and compute at best",
}

USAGE = "usage: aserve bench COMMAND [flags]\n\n" + "\n".join(
    f"  {name:<11} {text}" for name, text in COMMANDS.items()
)


def main(argv: list[str]) -> int:
    """Runs ``aserve bench`` with these arguments; returns the exit status (2 for unusable settings)."""
    if argv[:1] in ([], ["--help"], ["-h"]):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"aserve bench: unknown command {argv[0]!r}\n{USAGE}", file=sys.stderr)
        return 2
    try:
        status: int = importlib.import_module(f"aserve.bench.{argv[0]}").main(argv[1:])
    except ConfigError as error:
        print(f"aserve bench {argv[0]}: {error}", file=sys.stderr)
        return 2
    return status
