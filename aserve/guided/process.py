"""The other end of :mod:`aserve.guided.child`."""

from __future__ import annotations

import contextlib
import json
import pickle
import subprocess
import threading
from collections.abc import Callable, Sequence

from aserve import pipes, registry
from aserve.guided.base import GrammarError, GuideSpec, TooExpensiveError, Vocabulary

_START_TIMEOUT = 60.0
"""Seconds that the process may take to import a backend's package and read the vocabulary."""


class CompilerProcess:
    """A process that compiles one guide at a time, started when first needed and again after it ended.

    Belongs to one thread, but for :meth:`stop`. ``vocabulary`` is called whenever it has been started.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._ready: set[str] = set()

    @property
    def pid(self) -> int | None:
        """Of the running process; None if there is none."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def check(self, spec: GuideSpec, timeout: float, meanwhile: Callable[[], object]) -> bytes:
        """What the backend's ``check`` returns there. Raises GrammarError, also for a process that took
        longer than ``timeout`` seconds (it is killed) or ended.

        meanwhile: called here while the process gets ready for a backend it has not used before.
        """
        self.prepare(spec.backend, meanwhile)
        return self._ask(spec, timeout, lambda: None)

    def prepare(self, backend: str, meanwhile: Callable[[], object]) -> None:
        """Has the process ready for a backend; errors and ``meanwhile`` as for :meth:`check`."""
        self._running()
        if backend not in self._ready:
            self._ask([backend, registry.guided_backends.target(backend)], _START_TIMEOUT, meanwhile)
            self._ready.add(backend)

    def _ask(self, request: Sequence[str | None], timeout: float, meanwhile: Callable[[], object]) -> bytes:
        process = self._running()
        reply, late = pipes.ask(process, [json.dumps(request).encode()], timeout, meanwhile)
        if late or reply is None:
            self._end(process)
        if late:
            raise TooExpensiveError(f"took longer than {timeout:g} seconds to compile")
        if reply is None:
            raise TooExpensiveError("could not be compiled: it ended the process that does it")
        if reply[:1] != b"+":
            raise GrammarError(reply[1:].decode())
        return reply[1:]

    def stop(self) -> None:
        """Ends the process for good; a ``check`` that waits for it fails. May be called from any thread."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """:meth:`stop`, and gives everything back, once the thread it belongs to has ended."""
        self.stop()
        if self._process is not None:
            self._end(self._process)

    def _running(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise GrammarError("cannot be compiled: the engine has been closed")
            process = self._process
        if process is not None:
            if process.poll() is None:
                return process
            self._end(process)
        self._ready.clear()
        process = pipes.start("aserve.guided.child", OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1")
        with self._lock:
            self._process = process
            if self._closed:  # meanwhile
                process.kill()
        with contextlib.suppress(OSError):  # it ended at once: noticed when the first guide is sent
            pipes.write_message(pipes.streams(process)[1], pickle.dumps(self._vocabulary()))
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        pipes.end(process)
        with self._lock:
            if self._process is process:
                self._process = None
