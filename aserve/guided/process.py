"""The other end of :mod:`aserve.guided.child`."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from aserve import registry
from aserve.guided.base import GrammarError, GuideSpec, TooExpensiveError, Vocabulary
from aserve.guided.child import read_message, write_message

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
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout, end)
        timer.start()
        reply = None
        try:
            # Its end shows as a broken pipe or as the end of its output.
            with contextlib.suppress(OSError, ValueError):
                source, sink = _pipes(process)
                write_message(sink, json.dumps(request).encode())
                meanwhile()
                reply = read_message(source)
        finally:
            timer.cancel()
        if late.is_set() or reply is None:
            self._end(process)
        if late.is_set():
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
        process = self._start()
        with self._lock:
            self._process = process
            if self._closed:  # meanwhile
                process.kill()
        with contextlib.suppress(OSError):  # it ended at once: noticed when the first guide is sent
            write_message(_pipes(process)[1], pickle.dumps(self._vocabulary()))
        return process

    def _start(self) -> subprocess.Popen[bytes]:
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        # A session of its own: an interrupt typed at the terminal is for the server alone. What its
        # libraries print may quote the guide, so it goes nowhere.
        return subprocess.Popen(
            [sys.executable, "-m", "aserve.guided.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        with self._lock:
            if self._process is process:
                self._process = None


def _pipes(process: subprocess.Popen[bytes]) -> tuple[BinaryIO, BinaryIO]:
    if process.stdout is None or process.stdin is None:
        raise ValueError("the process was started without pipes")
    return cast("BinaryIO", process.stdout), cast("BinaryIO", process.stdin)
