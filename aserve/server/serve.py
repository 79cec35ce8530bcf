"""Runs the application under Hypercorn, and ends it without cutting a stream."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import uvloop
from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config

from aserve.errors import AserveError, ConfigError
from aserve.server import pipelining
from aserve.server.app import create_app
from aserve.server.connection import all_answered
from aserve.server.process import loop_nice, settle, yield_to_compute

if TYPE_CHECKING:
    from quart import Quart

    from aserve.args import AsyncEngineArgs
    from aserve.config.server import ServerArgs
    from aserve.engine.async_engine import AsyncLLMEngine

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75.0
"""Longer than the idle time of the usual proxies and client pools, so that the client closes first."""

STARTUP_SECONDS = 1800.0
BACKLOG = 2048
FLUSH_SECONDS = 5.0
"""Seconds answers have to leave after the last request has ended."""


def run(engine_args: AsyncEngineArgs, server_args: ServerArgs) -> int:
    """Serves until told to stop; returns the exit status.

    0 after a stop by SIGTERM or SIGINT, 1 if the model cannot be loaded. Raises ConfigError for
    settings that cannot work, before weights are read.
    """
    from aserve.engine.async_engine import AsyncLLMEngine
    from aserve.messages.inputs import UsageContext

    async def main() -> int:
        engine = AsyncLLMEngine.from_engine_args(engine_args, usage_context=UsageContext.OPENAI_API_SERVER)
        return await serve(engine, server_args, engine_args)

    return uvloop.run(main())


async def serve(
    engine: AsyncLLMEngine, server_args: ServerArgs, engine_args: AsyncEngineArgs | None = None
) -> int:
    """Serves ``engine`` on the running loop until a signal; returns the exit status."""
    failed = asyncio.Event()
    nice = loop_nice()

    def on_loaded() -> None:
        # Not before: the threads that load and compute have been started by threads that inherit.
        settle()
        yield_to_compute(nice)

    app = create_app(engine_args, server_args, engine, on_fatal=failed.set, on_loaded=on_loaded)
    listener = listen(server_args.host, server_args.port)
    where = base_url(server_args, listener)
    config = hypercorn_config(server_args, listener.detach())
    pipelining.install()
    with _signals() as (stop, now):

        async def until_told() -> None:
            waits = [asyncio.ensure_future(event.wait()) for event in (stop, failed)]
            announce = asyncio.ensure_future(_announce(app, where))
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (*waits, announce):
                    task.cancel()
            if not failed.is_set():
                await drain(app, server_args.drain_timeout, now)
            if now.is_set():
                config.graceful_timeout = 0.0

        await hypercorn_serve(app, config, shutdown_trigger=until_told)
    return 1 if failed.is_set() else 0


async def drain(app: Quart, seconds: float, now: asyncio.Event) -> None:
    """Refuses new requests, gives the running ones ``seconds``, then ends them; ``now`` cuts that short."""
    shared = app.extensions["aserve"]
    shared.refuse_new("the server is shutting down")
    if not shared.loaded:
        return
    engine = shared.engine
    logger.info("stopping: %d requests have %g s to finish", engine.num_unfinished, seconds)
    idle = asyncio.ensure_future(engine.idle())
    hurried = asyncio.ensure_future(now.wait())
    try:
        await asyncio.wait((idle, hurried), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        idle.cancel()
        hurried.cancel()
    engine.abort_all("the server is shutting down")
    if not now.is_set():
        with anyio.move_on_after(FLUSH_SECONDS):
            await all_answered(app)


@contextmanager
def _signals() -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Events of the first and the second SIGTERM or SIGINT; a third ends the process on the spot."""
    loop = asyncio.get_running_loop()
    stop, now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if now.is_set():
            os._exit(130)
        (now if stop.is_set() else stop).set()

    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop, now
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _announce(app: Quart, where: str) -> None:
    """Says where to connect once requests are served."""
    try:
        engine = await app.extensions["aserve"].ready_engine()
    except AserveError:
        return  # said where it was found
    name = engine.model_config.served_model_name[0]
    logger.info("serving %s: API at %s/v1, chat page at %s/", name, where, where)


def base_url(args: ServerArgs, listener: socket.socket) -> str:
    """The address to type into a browser on this machine."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    scheme = "https" if args.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{args.root_path or ''}"


def listen(host: str | None, port: int) -> socket.socket:
    """A bound socket for ``host`` (None: every interface). Raises ConfigError if it cannot be bound.

    Bound here, before the model is loaded, so that a taken port is reported at once.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        found.sort(key=lambda info: info[0] != socket.AF_INET)
        wanted = found[:1] if host is not None or not socket.has_dualstack_ipv6() else []
        if wanted:
            family, _, _, _, address = wanted[0]
            return _bound(socket.socket(family, socket.SOCK_STREAM), address)
        both = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        return _bound(both, ("::", port))
    except OSError as error:
        raise ConfigError(f"cannot listen on {host or '*'}:{port}: {error.strerror or error}") from error


def _bound(sock: socket.socket, address: Any) -> socket.socket:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


class _Config(Config):
    """Hypercorn's settings, with one making of what all answers of a second say: the date."""

    _told: tuple[int, str, list[tuple[bytes, bytes]]] = (0, "", [])

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        second = int(time.time())
        if self._told[:2] != (second, protocol):
            self._told = second, protocol, super().response_headers(protocol)
        return list(self._told[2])


def hypercorn_config(args: ServerArgs, fd: int) -> Config:
    """Hypercorn's settings for the bound socket ``fd``, which is Hypercorn's to close."""
    config = _Config()
    config.bind = [f"fd://{fd}"]
    config.root_path = args.root_path or ""
    config.backlog = BACKLOG
    config.keep_alive_timeout = KEEP_ALIVE_SECONDS
    config.startup_timeout = STARTUP_SECONDS
    config.graceful_timeout = FLUSH_SECONDS
    config.loglevel = "debug" if args.log_level == "trace" else args.log_level
    config.accesslog = None  # an entry copies the whole environment
    config.include_server_header = False
    config.alpn_protocols = ["http/1.1"]  # HTTP/2 costs twice as much per event
    if args.ssl_certfile is not None:
        config.certfile = args.ssl_certfile
        config.keyfile = args.ssl_keyfile or args.ssl_certfile
        config.ca_certs = args.ssl_ca_certs
        config.verify_mode = ssl.VerifyMode(args.ssl_cert_reqs)
    return config
