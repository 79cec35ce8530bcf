"""Serves a fake engine as ``aserve serve`` would.

Arguments: seconds per token, flags; between them ``loads``, ``fails`` (to load), or ``dies`` (a second
after a request has begun).
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from aserve import log
from aserve.args import parse_serve_args
from aserve.server.serve import serve
from tests.server.fake_engine import FakeEngine


async def die(engine: FakeEngine) -> None:
    while not engine.num_unfinished:  # noqa: ASYNC110 - the fake has no event for it
        await asyncio.sleep(0.01)
    await asyncio.sleep(1.0)
    engine.die("the engine loop has failed: RuntimeError: lost at 0x7f0000c0ffee")
    engine.on_dead()


async def main(argv: list[str]) -> int:
    tick, fate = float(argv.pop(0)), argv.pop(0)
    _, server_args = parse_serve_args(argv)
    log.setup(server_args.log_level)
    engine = FakeEngine()
    engine.tick = tick
    if fate == "fails":
        engine.load_error = OSError("the disk is on fire")
    if fate == "dies":
        dying = asyncio.create_task(die(engine))
        dying.add_done_callback(lambda task: task.result())
    return await serve(engine, server_args)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(uvloop.run(main(sys.argv[1:])))
