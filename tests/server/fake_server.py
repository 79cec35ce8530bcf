"""Serves a fake engine as ``aserve serve`` would.

Arguments: seconds per token, ``fails`` or ``loads``, flags.
"""

from __future__ import annotations

import sys

import uvloop

from aserve import log
from aserve.args import parse_serve_args
from aserve.server.serve import serve
from tests.server.fake_engine import FakeEngine


async def main(argv: list[str]) -> int:
    tick, fails = float(argv.pop(0)), argv.pop(0) == "fails"
    _, server_args = parse_serve_args(argv)
    log.setup(server_args.log_level)
    engine = FakeEngine()
    engine.tick = tick
    if fails:
        engine.load_error = OSError("the disk is on fire")
    return await serve(engine, server_args)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(uvloop.run(main(sys.argv[1:])))
