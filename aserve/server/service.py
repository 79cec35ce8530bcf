"""What the routes share: the engine, its state as seen from outside, and the server's settings."""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import re
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from quart import current_app, g, request

from aserve.errors import AserveError, EngineBusyError, EngineDeadError, InvalidRequestError
from aserve.server.bodies import BodyReader
from aserve.server.direct import Courier
from aserve.server.killable import KillableThreads
from aserve.server.openai.tools.plan import check_at_start
from aserve.server.survey import LEAST_LONGEST, Limits, Survey

if TYPE_CHECKING:
    from aserve.config.server import ServerArgs
    from aserve.engine.async_engine import AsyncLLMEngine
    from aserve.server.tracing import RequestTraces

logger = logging.getLogger(__name__)

_UNSAFE = re.compile(r"[^A-Za-z0-9._:/+=@-]")
MAX_REQUEST_ID = 128


LAST_WORDS_SECONDS = 1.0
"""Seconds between the engine's death and the end of the process."""


RENDER_SECONDS = 2.0
"""Seconds the chat template may take for one conversation."""

MOST_RENDERERS = 16


class Condition(enum.Enum):
    """What the health routes tell apart."""

    STARTING = enum.auto()
    SERVING = enum.auto()
    DRAINING = enum.auto()
    STALLED = enum.auto()
    """There is work and no step has finished for longer than ``stall_timeout``."""
    DEAD = enum.auto()


class Service:
    """The engine behind the routes, from before it is loaded until it is stopped.

    on_fatal: called once, from the event loop, if the engine cannot be loaded.
    on_loaded: called once, likewise, when it is.
    traced_by: makes the traces of a model's requests from its name; they are not traced without.
    """

    def __init__(
        self,
        args: ServerArgs,
        *,
        chat_template: str | None = None,
        log_requests: bool = True,
        on_fatal: Callable[[], None] | None = None,
        on_loaded: Callable[[], None] | None = None,
        traced_by: Callable[[str], RequestTraces] | None = None,
    ) -> None:
        self.args = args
        self.chat_template = chat_template
        self.log_requests = log_requests
        self.engine: AsyncLLMEngine | None = None
        self.on_fatal = on_fatal
        self.on_loaded = on_loaded
        self._traced_by = traced_by
        self.traces: RequestTraces | None = None
        self.load_error: BaseException | None = None
        self.draining: str | None = None
        self.courier = Courier()
        self.bodies = BodyReader()
        self._renderers = KillableThreads("aserve-render", MOST_RENDERERS)
        self._template_ends = False
        self._warm = False
        self._loading: asyncio.Task[None] | None = None
        self._warming: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._unknown_fields: set[str] = set()

    # ---------------------------------------------------------------- life of the engine

    def start(self, engine: AsyncLLMEngine, *, warm: bool = False) -> None:
        """Begins to load ``engine``; the port can open meanwhile.

        warm: once it is ready, it also prepares for guided requests and large bodies.
        """
        self.engine = engine
        self._warm = warm
        engine.on_dead = self._engine_died
        self._loading = asyncio.create_task(self._load(engine), name="load engine")
        self._loading.add_done_callback(self._loaded)

    async def _load(self, engine: AsyncLLMEngine) -> None:
        await engine.start()
        if self._traced_by is not None and engine.engine is not None:
            self.traces = self._traced_by(engine.model_config.served_model_name[0])
            engine.engine.output.tracer = self.traces
        if self._warm and engine.engine is not None:
            # Reads the vocabulary once, which would hold up every stream at the first very long text.
            await asyncio.to_thread(engine.engine.input.check_fits, "")
        check_at_start(
            await engine.get_tokenizer(),
            self.chat_template,
            self.args.tool_call_parser,
            needed=self.args.enable_auto_tool_choice,
        )

    def _loaded(self, task: asyncio.Task[None]) -> None:
        self._settled.set()
        if task.cancelled():
            return
        self.load_error = task.exception()
        if self.load_error is None:
            if self.on_loaded is not None:
                self.on_loaded()
            if self._warm and self.engine is not None:
                self.engine.warm_guides()
                self._warming = asyncio.create_task(self.bodies.warm(), name="start reader of large bodies")
            return
        if isinstance(self.load_error, AserveError):
            logger.error("the model could not be loaded: %s", self.load_error)
        else:
            logger.error(
                "the model could not be loaded: %s: %s",
                type(self.load_error).__name__,
                self.load_error,
                exc_info=self.load_error,
            )
        if self.on_fatal is not None:
            self.on_fatal()

    def _engine_died(self) -> None:
        """Ends the process, once those whose requests have failed had a moment to be told."""
        logger.critical("the engine is dead: the server ends")
        if self.on_fatal is not None:
            asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, self.on_fatal)

    async def stop(self) -> None:
        if self._loading is not None and not self._loading.done():
            self._loading.cancel()
            await asyncio.wait([self._loading])
        if self._warming is not None:
            await self._warming
        self.bodies.close()
        if self.engine is not None:
            await self.engine.stop()
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)

    @property
    def loaded(self) -> bool:
        return (
            self.engine is not None
            and self._loading is not None
            and self._settled.is_set()
            and (not self._loading.cancelled() and self.load_error is None)
        )

    async def ready_engine(self) -> AsyncLLMEngine:
        """The engine, once it is loaded. Raises EngineBusyError while draining, EngineDeadError after a
        failed load."""
        if self.draining is not None:
            raise EngineBusyError(self.draining)
        if self.engine is None or self._loading is None:
            raise EngineBusyError("the server is starting")
        if not self._settled.is_set():
            # Not the task: that is done a moment before its outcome is noted.
            await self._settled.wait()
        if self.load_error is not None or self._loading.cancelled():
            raise EngineDeadError("the model could not be loaded")
        return self.engine

    def condition(self) -> tuple[Condition, str]:
        """How the engine is, and why in one sentence. Looks at what is known and waits for nothing."""
        if self.load_error is not None:
            return Condition.DEAD, "the model could not be loaded"
        if not self.loaded or self.engine is None:
            return Condition.STARTING, "the model is being loaded"
        try:
            self.engine.check()
        except EngineDeadError as error:
            return Condition.DEAD, error.message
        seconds = self.engine.stalled_for()
        if seconds > self.args.stall_timeout:
            return Condition.STALLED, f"requests wait and no step has finished for {seconds:.0f} s"
        if self.draining is not None:
            return Condition.DRAINING, self.draining
        return Condition.SERVING, ""

    def refuse_new(self, reason: str) -> None:
        """From now on every new request is answered 503; running ones go on."""
        self.draining = reason
        if self.engine is not None:
            self.engine.refuse_new(reason)

    def count_error(self, status: int) -> None:
        """Adds an answer to the metrics, which begin when the model is loaded."""
        if self.loaded and self.engine is not None and self.engine.stats is not None:
            self.engine.stats.on_http_error(status)

    # ---------------------------------------------------------------- large bodies

    def survey(self, limits: Limits) -> Survey:
        """What looks at a large body with these limits as it comes."""
        engine = self.engine if self.loaded else None
        if engine is None:
            return Survey(limits)
        longest = engine.longest_text
        return Survey(
            limits,
            engine.model_config.max_model_len,
            None if longest is None else max(longest, LEAST_LONGEST),
        )

    # ---------------------------------------------------------------- chat templates

    async def render(self, work: Callable[[], str], *, quick: bool) -> str:
        """What ``work`` makes of a conversation with the model's template.

        A template is a program. It is run in a thread that can be stopped until it has once come to an end,
        and whenever ``quick`` does not say that there is little to do; InvalidRequestError if it takes longer
        than RENDER_SECONDS, QueueFullError if too many are being rendered.
        """
        if quick and self._template_ends:
            return work()
        try:
            text = await self._renderers.run(work, RENDER_SECONDS)
        except TimeoutError:
            raise InvalidRequestError(
                f"the chat template took longer than {RENDER_SECONDS:g} s for these messages",
                param="messages",
            ) from None
        self._template_ends = True
        return text

    # ---------------------------------------------------------------- log

    def note_unknown_fields(self, names: set[str]) -> None:
        """Says once per name that a request field is ignored."""
        if len(self._unknown_fields) >= 200:  # a client that makes names up must not fill the log
            return
        new = sorted(names - self._unknown_fields)[:20]
        if new:
            self._unknown_fields.update(new)
            logger.info("request fields ignored: %s", ", ".join(name[:64] for name in new))


def service() -> Service:
    """The service of the app that handles the present request."""
    found: Service = current_app.extensions["aserve"]
    return found


def new_id(prefix: str) -> str:
    """A random id, such as ``cmpl-<32 hex digits>``. Never made of anything a client sent."""
    try:
        return f"{prefix}-{_unused_ids.pop()}"
    except IndexError:  # asking the system for randomness costs as much as answering a route
        many = secrets.token_hex(16 * IDS_AT_ONCE)
        _unused_ids.extend(many[at : at + 32] for at in range(0, len(many), 32))
        return f"{prefix}-{_unused_ids.pop()}"


IDS_AT_ONCE = 64
_unused_ids: list[str] = []
os.register_at_fork(after_in_child=_unused_ids.clear)


def client_request_id() -> str | None:
    """The client's ``X-Request-Id``, cut and cleaned; for logs and for the answer's header only."""
    given = request.headers.get("X-Request-Id")
    if not given:
        return None
    return _UNSAFE.sub("_", given[:MAX_REQUEST_ID])


def log_client_id(request_id: str) -> None:
    """Ties our request id to the client's, and to the name of its key, in the log."""
    if not service().log_requests:
        return
    given, key = client_request_id(), g.get("key_name")
    if given is not None:
        logger.info("%s has X-Request-Id %s", request_id, given)
    if key is not None:
        logger.info("%s has key %s", request_id, key)
