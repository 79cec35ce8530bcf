"""The server that ``aserve.bench.soak --flood`` sends to: the real one over an instant executor."""

from __future__ import annotations

import sys

import uvloop

from aserve import log
from aserve.args import parse_serve_args
from aserve.bench.frontend_server import TEXT, InstantExecutor


def main(argv: list[str]) -> int:
    """``argv`` is that of ``aserve serve``; returns the exit status."""
    engine_args, server_args = parse_serve_args(argv)
    log.setup(server_args.log_level)
    from aserve.engine.async_engine import AsyncLLMEngine
    from aserve.engine.llm_engine import LLMEngine
    from aserve.server.serve import serve

    async def run() -> int:
        engine = AsyncLLMEngine(False, False, log_requests=not engine_args.disable_log_requests)
        config = engine_args.create_engine_config()
        engine.engine = LLMEngine.from_config(config, log_stats=True, executor_class=InstantExecutor)
        tokenizer = engine.engine.get_tokenizer()
        InstantExecutor.tokens = tokenizer.encode(TEXT, add_special_tokens=False)
        return await serve(engine, server_args, engine_args)

    return uvloop.run(run())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
