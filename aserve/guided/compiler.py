"""From the guide of a request to a grammar its outputs can be matched with."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from aserve import registry
from aserve.config.decoding import DecodingConfig
from aserve.errors import InvalidRequestError, QueueFullError
from aserve.guided import limits
from aserve.guided.base import Backend, Grammar, GrammarError, GuideSpec, TooExpensiveError, Vocabulary
from aserve.guided.process import CompilerProcess
from aserve.messages.params import GuidedParams

logger = logging.getLogger(__name__)

MAX_WAITING = 64
"""Guides being compiled or waiting for it; more are refused."""

_ERROR_SIZE = 1 << 10
"""Bytes a remembered refusal counts with."""


class GrammarCompiler:
    """Compiles guides away from the caller's thread and keeps the grammars used last.

    One thread, with one process that does the work and can be killed, compiles guides in turn: the
    thread mostly waits for the process. Guides that are equal, kind, text, backend and whitespace, share
    a grammar, and so do requests that ask for one while it is compiled.

    vocabulary: called once, from that thread, when the first guide comes.
    """

    def __init__(self, config: DecodingConfig, vocabulary: Callable[[], Vocabulary]) -> None:
        self._config = config
        self._read_vocabulary = vocabulary
        self._cache: OrderedDict[GuideSpec, Grammar | str] = OrderedDict()
        self._cached_bytes = 0
        self._running: dict[GuideSpec, Future[Grammar]] = {}
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._process: CompilerProcess | None = None
        self._vocabulary: Vocabulary | None = None
        self._backends: dict[str, Backend] = {}
        self._closed = False

    def check(self, guided: GuidedParams) -> None:
        """Refuses what can be refused at once. Raises InvalidRequestError."""
        name = guided.backend or self._config.guided_decoding_backend
        if name not in registry.guided_backends:
            known = ", ".join(registry.guided_backends)
            raise guided.refusal("backend", f"must be one of {known}")
        missing = registry.guided_backends.load(name).missing()
        if missing is not None:
            raise guided.refusal("backend", f"{name} {missing}")
        limits.check(guided)

    def start(self, guided: GuidedParams) -> Future[Grammar]:
        """The grammar of a guide that ``check`` let pass; its errors are turned by :meth:`error`.

        Raises QueueFullError. The future may be shared: do not cancel it.
        """
        spec = GuideSpec.of(guided, self._config.guided_decoding_backend)
        with self._lock:
            found = self._cache.get(spec)
            if found is not None:
                self._cache.move_to_end(spec)
                return _done(found)
            future = self._running.get(spec)
            if future is not None:
                return future
            if len(self._running) >= MAX_WAITING:
                raise QueueFullError("too many guides are waiting to be compiled")
            if self._closed:
                return _done("cannot be compiled: the engine has been closed")
            future = self._running[spec] = Future()
            self._submit(self._work, spec, future)
        return future

    def warm(self) -> None:
        """Has the process, the vocabulary and the configured backend ready before a guide comes.

        Returns at once. Without a tokenizer that guides can be matched with, nothing is started.
        """
        with self._lock:
            if not self._closed:
                self._submit(self._warm)

    def compile(self, guided: GuidedParams) -> Grammar:
        """:meth:`start`, waited for. Raises InvalidRequestError, QueueFullError."""
        try:
            return self.start(guided).result()
        except (GrammarError, InvalidRequestError) as error:
            raise self.error(guided, error) from None

    @staticmethod
    def error(guided: GuidedParams, error: Exception) -> InvalidRequestError:
        """What the caller is told about a guide whose compilation failed."""
        if isinstance(error, InvalidRequestError):
            return InvalidRequestError(error.message, param=guided.param)
        return guided.refusal(guided.kind, str(error))

    def close(self) -> None:
        """Ends the process and the thread; what waits fails. Idempotent."""
        with self._lock:
            self._closed = True
            thread, process = self._thread, self._process
        if process is not None:
            process.stop()
        if thread is not None:
            thread.shutdown(wait=True)
        if self._process is not None:
            self._process.close()

    @property
    def cached_bytes(self) -> int:
        return self._cached_bytes

    def __len__(self) -> int:
        return len(self._cache)

    def _submit(self, work: Callable[..., None], *args: object) -> None:
        """Gives the thread something to do. The lock is held."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="aserve-guided")
        self._thread.submit(work, *args)

    # ---------------------------------------------------------------- in the thread

    def _warm(self) -> None:
        name = self._config.guided_decoding_backend
        try:
            self._get_vocabulary()
            self._get_process().prepare(name, lambda: self._backend(name))
        except InvalidRequestError as error:
            logger.debug("no guides will be compiled: %s", error.message)
        except GrammarError as error:
            logger.warning("the guided decoding backend %s could not be made ready: it %s", name, error)
        except Exception as error:  # told again, to the one who asks, by every guide
            logger.warning("the guided decoding backend %s could not be made ready", name, exc_info=error)

    def _work(self, spec: GuideSpec, future: Future[Grammar]) -> None:
        result: Grammar | GrammarError | InvalidRequestError
        remembered = True
        try:
            result = self._compile(spec)
        except (TooExpensiveError, InvalidRequestError) as error:
            logger.warning("a guide was refused: it %s", error)
            result, remembered = error, False
        except GrammarError as error:
            result = error
        except Exception as error:  # whatever a backend does must not end this thread
            logger.warning("a guide could not be loaded", exc_info=error)
            result, remembered = GrammarError(f"cannot be used ({type(error).__name__})"), False
        with self._lock:
            del self._running[spec]
            if remembered:
                self._keep(spec, result if isinstance(result, Grammar) else str(result))
        if isinstance(result, Grammar):
            future.set_result(result)
        else:
            future.set_exception(result)

    def _compile(self, spec: GuideSpec) -> Grammar:
        kind: type[Backend] = registry.guided_backends.load(spec.backend)
        timeout = self._config.compile_timeout or kind.timeout
        payload = self._get_process().check(spec, timeout, lambda: self._backend(spec.backend))
        grammar = self._backend(spec.backend).load(spec, payload)
        grammar.textless = self._get_vocabulary().textless
        return grammar

    def _get_process(self) -> CompilerProcess:
        with self._lock:
            if self._process is None and not self._closed:
                self._process = CompilerProcess(self._get_vocabulary)
            process = self._process
        if process is None:
            raise TooExpensiveError("cannot be compiled: the engine has been closed")
        return process

    def _backend(self, name: str) -> Backend:
        found = self._backends.get(name)
        if found is None:
            found = self._backends[name] = registry.guided_backends.load(name)(self._get_vocabulary())
        return found

    def _get_vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary()
        return self._vocabulary

    def _keep(self, spec: GuideSpec, result: Grammar | str) -> None:
        """Adds to the cache, and drops what was used longest ago. The lock is held."""
        self._cache[spec] = result
        self._cached_bytes += _size(spec, result)
        while self._cached_bytes > self._config.cache_bytes:
            old, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= _size(old, dropped)


def _size(spec: GuideSpec, result: Grammar | str) -> int:
    return 2 * len(spec.text) + (_ERROR_SIZE if isinstance(result, str) else result.size)


def _done(result: Grammar | str) -> Future[Grammar]:
    future: Future[Grammar] = Future()
    if isinstance(result, str):
        future.set_exception(GrammarError(result))
    else:
        future.set_result(result)
    return future
