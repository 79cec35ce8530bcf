"""The command ``aserve``."""

from __future__ import annotations

import dataclasses
import logging
import sys
from typing import Any

import aserve
from aserve import log
from aserve.args import parse_serve_args
from aserve.errors import ConfigError
from aserve.threads import calm_threads

USAGE = """usage: aserve serve [MODEL] [flags]
       aserve bench {serve,throughput,latency,limits} [flags]
       aserve simulate [flags]
       aserve run-batch -i FILE -o FILE [flags]
       aserve gpu-check [flags]
       aserve --version

`serve` serves a model over the OpenAI API, `bench` measures, `simulate` predicts, `run-batch` answers a file
of requests, `gpu-check` proves and times the CUDA kernels; `--help` after each lists the flags."""

SECRETS = ("api_key",)

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status (2 for settings that cannot work)."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] in (["--version"], ["-V"]):
        print(aserve.__version__)
        return 0
    if arguments[:1] in ([], ["--help"], ["-h"]):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "bench":
        from aserve.bench import cli

        return cli.main(arguments[1:])
    if arguments[0] == "simulate":
        from aserve.simulate.cli import main as simulate

        return simulate(arguments[1:])
    if arguments[0] == "run-batch":
        from aserve.batch.cli import main as run_batch

        return run_batch(arguments[1:])
    if arguments[0] == "gpu-check":
        from aserve.gpu_check.cli import main as gpu_check

        return gpu_check(arguments[1:])
    if arguments[0] != "serve":
        print(f"aserve: unknown command {arguments[0]!r}\n{USAGE}", file=sys.stderr)
        return 2
    return serve(arguments[1:])


def serve(argv: list[str]) -> int:
    try:
        engine_args, server_args = parse_serve_args(argv)
        log.setup(server_args.log_level)
        announce(server_args, engine_args)
        calm_threads()
        from aserve.server.serve import run  # imports torch: not before the arguments are known to parse

        return run(engine_args, server_args)
    except ConfigError as error:
        print(f"aserve: {error}", file=sys.stderr)
        return 2


def announce(*settings: Any) -> None:
    """Logs the version and the effective settings."""
    logger.info("aserve %s", aserve.__version__)
    for each in settings:
        logger.info("%s", shown(each))


def shown(args: Any) -> str:
    """Every argument and its value on one line, secrets hidden."""
    parts = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name in SECRETS and value:
            value = "***"
        parts.append(f"{field.name}={value!r}")
    return f"{type(args).__name__}({', '.join(parts)})"


if __name__ == "__main__":
    sys.exit(main())
