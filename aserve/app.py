"""``hypercorn aserve.app:app``: the server with its flags in the environment variable ASERVE_ARGS.

Importing this module reads the environment, sets uvloop's event loop policy and changes how Hypercorn
reads connections; nothing else in aserve acts on import.

Under plain Hypercorn the application cannot see signals, so it cannot drain: Hypercorn gives open
streams its own ``graceful_timeout`` and cuts them. ``aserve serve`` drains.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import multiprocessing
import os
import shlex
import sys
import tempfile
from typing import IO

import uvloop

from aserve import log
from aserve.args import parse_serve_args
from aserve.config.server import ServerArgs
from aserve.errors import ConfigError
from aserve.server import pipelining
from aserve.server.app import create_app
from aserve.server.cli import announce
from aserve.server.process import loop_nice, settle, yield_to_compute
from aserve.threads import calm_threads

ARGS_VARIABLE = "ASERVE_ARGS"

HYPERCORNS = ("host", "port", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "drain_timeout")
"""Settings that are Hypercorn's own when it runs the application."""

logger = logging.getLogger(__name__)


def take_worker_lock() -> IO[bytes] | None:
    """Holds the one place among the workers of a Hypercorn, for the life of the process.

    None outside a worker process. Raises ConfigError if a sibling has the place: each would load the
    model, and each would know only its own requests.
    """
    master = multiprocessing.parent_process()
    if master is None:
        return None
    path = os.path.join(tempfile.gettempdir(), f"aserve-{os.getuid()}-{master.pid}.lock")
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.fdopen(os.open(path, flags, 0o600), "rb+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            "Hypercorn runs with more than one worker, and every worker would load the model; "
            "run it with --workers 1"
        ) from None
    return lock


def set_loop_policy() -> None:
    """Makes Hypercorn's default worker run on uvloop, as ``-k uvloop`` would."""
    # Policies are deprecated from Python 3.14 on; there `-k uvloop` is the way.
    if sys.version_info < (3, 14):
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def warn_of_hypercorns(args: ServerArgs) -> None:
    """Names the settings that were given and are not heeded here."""
    plain = ServerArgs()
    given = [name for name in HYPERCORNS if getattr(args, name) != getattr(plain, name)]
    if given:
        logger.warning("not heeded under hypercorn, which has its own: %s", ", ".join(given))


def make_app() -> object:
    argv = shlex.split(os.environ.get(ARGS_VARIABLE, ""))
    engine_args, server_args = parse_serve_args(argv, prog=ARGS_VARIABLE)
    log.setup(server_args.log_level)
    announce(server_args, engine_args)
    calm_threads()
    warn_of_hypercorns(server_args)
    nice = loop_nice()

    def on_loaded() -> None:
        settle()
        yield_to_compute(nice)

    return create_app(engine_args, server_args, on_loaded=on_loaded)


try:
    _lock = take_worker_lock()
    set_loop_policy()
    pipelining.install()
    app = make_app()
except ConfigError as error:
    print(f"aserve: {error}", file=sys.stderr)
    sys.exit(2)
