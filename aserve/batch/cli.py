"""The command ``aserve run-batch``."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from tqdm import tqdm

from aserve import log
from aserve.args import AsyncEngineArgs
from aserve.batch import files, lines
from aserve.config.cli import add_flags, arg, check_types, from_namespace
from aserve.config.server import LOG_LEVELS, ServerArgs
from aserve.errors import AserveError, ConfigError

if TYPE_CHECKING:
    from aserve.batch.runner import Totals

logger = logging.getLogger(__name__)

_BATCH = "Batch arguments"
_PER_SLOT = 4
"""Lines in flight for each sequence that can run, so that the engine need not wait for a slow one."""


@dataclass
class BatchArgs:
    """Arguments of a batch; :meth:`check` raises ConfigError for values that cannot work."""

    input_file: str = arg(
        group=_BATCH, short=("-i",), help="JSON Lines of requests: a path, or an http(s) address."
    )
    output_file: str = arg(
        group=_BATCH, short=("-o",), help="JSON Lines of answers: a path, or an http(s) address to PUT to."
    )
    response_role: str = arg("assistant", group=_BATCH, help="Role of the answers of chats.")
    chat_template: str | None = arg(
        None, group=_BATCH, help="Chat template, as a file or as text; unset: the model's own."
    )
    strict_fields: bool = arg(False, group=_BATCH, help="Refuse requests with a field that is not known.")
    max_in_flight: int | None = arg(
        None,
        group=_BATCH,
        help="Lines held in memory at a time.",
        default_text=f"{_PER_SLOT} times max_num_seqs",
    )
    max_line_size: int = arg(
        16 * 1024 * 1024, group=_BATCH, help="Most bytes of a line; longer ones get an error line."
    )
    log_level: str = arg("info", group=_BATCH, choices=LOG_LEVELS, help="Log level.")

    def check(self) -> None:
        check_types(self)
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ConfigError(
                f"max_in_flight must be at least 1, got {self.max_in_flight}", param="max_in_flight"
            )
        if self.max_line_size < 1:
            raise ConfigError(
                f"max_line_size must be at least 1, got {self.max_line_size}", param="max_line_size"
            )
        if files.same(self.input_file, self.output_file):
            raise ConfigError("output_file is input_file, which would be lost", param="output_file")


def parse(argv: list[str]) -> tuple[AsyncEngineArgs, BatchArgs]:
    """Reads the command line; ends the process with status 2 if it is malformed."""
    parser = argparse.ArgumentParser(
        prog="aserve run-batch",
        allow_abbrev=False,
        description="Answers every request of a file in the format of OpenAI's Batch API. Status 1: a line "
        "was no request, or the model could not be loaded.",
    )
    add_flags(parser, BatchArgs)
    parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="the same as --model")
    AsyncEngineArgs.add_cli_args(parser)
    namespace = parser.parse_args(argv)
    named = namespace.model_positional
    if named is not None:
        if namespace.model not in (None, named):
            parser.error(f"MODEL is {named!r} and --model {namespace.model!r}: give one of them")
        namespace.model = named
    for flag in ("input_file", "output_file"):
        if not getattr(namespace, flag):
            parser.error(f"--{flag.replace('_', '-')} is required")
    batch = BatchArgs(**from_namespace(BatchArgs, namespace))
    batch.check()
    engine = AsyncEngineArgs.from_cli_args(namespace)
    for name in ("max_waiting_requests", "max_waiting_tokens"):
        if getattr(engine, name) is not None:
            raise ConfigError(f"{name} refuses requests, and a batch waits instead", param=name)
    return engine, batch


def main(argv: list[str]) -> int:
    """Runs a batch; returns the exit status."""
    try:
        engine, batch = parse(argv)
        log.setup(batch.log_level)
        with files.source(batch.input_file) as source, files.target(batch.output_file) as target:
            import uvloop  # and what follows it: not before the arguments are known to be right

            totals = uvloop.run(answer_all(engine, batch, source, target))
    except ConfigError as error:
        print(f"aserve run-batch: {error}", file=sys.stderr)
        return 2
    except AserveError as error:
        print(f"aserve run-batch: {error}", file=sys.stderr)
        return 1
    logger.info("%d answered, %d refused, %d lines were no requests", totals.done, totals.refused, totals.bad)
    return 1 if totals.bad else 0


async def answer_all(
    engine_args: AsyncEngineArgs, batch: BatchArgs, source: IO[bytes], target: IO[bytes]
) -> Totals:
    """Loads the model and answers every line. Raises AserveError if the model cannot be loaded."""
    from aserve.batch.runner import run
    from aserve.engine.async_engine import AsyncLLMEngine
    from aserve.messages.inputs import UsageContext
    from aserve.server.app import create_app

    context = UsageContext.OPENAI_BATCH_RUNNER
    engine = AsyncLLMEngine.from_engine_args(engine_args, usage_context=context)
    server = ServerArgs(
        response_role=batch.response_role,
        chat_template=batch.chat_template,
        strict_fields=batch.strict_fields,
        max_body_size=batch.max_line_size,
    )
    app = create_app(engine_args, server, engine, on_fatal=lambda: None, warm=False)
    await app.startup()
    try:
        await app.extensions["aserve"].ready_engine()
        with tqdm(unit="line", dynamic_ncols=True, disable=None) as bar:
            return await run(
                app,
                lines.read(source, batch.max_line_size),
                target,
                in_flight=batch.max_in_flight or _PER_SLOT * engine.config.scheduler.max_num_seqs,
                progress=bar.update,
            )
    finally:
        await app.shutdown()
