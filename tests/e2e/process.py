"""A real server in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import httpx
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 90.0
STOP_SECONDS = 60.0
SERVING = re.compile(r"serving .*?(https?://[^/\s]+)")


class Server:
    """``python -m aserve serve smollm2`` with further flags, on a free port of 127.0.0.1.

    command: replaces the command line; its log must still name the address.
    Entering waits until requests are served; leaving sends SIGTERM if nothing else ended the process.
    """

    def __init__(
        self,
        *flags: str,
        command: list[str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._command = command or [
            *(sys.executable, "-m", "aserve", "serve", "smollm2"),
            *("--host", "127.0.0.1", "--port", "0", *flags),
        ]
        # One thread: two that spin for each other on busy cores are many times slower than one.
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
        self._address: str | None = None
        self._lines: list[str] = []
        self._found = threading.Event()

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            if not self._found.wait(START_SECONDS) or self._address is None:
                raise RuntimeError(f"the server did not start; its log:\n{self.log}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)
            match = SERVING.search(line)
            if match and self._address is None:
                self._address = match[1]
                self._found.set()
        self._found.set()

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    @property
    def url(self) -> str:
        assert self._address is not None, "the server is not running"
        return self._address

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """The exit status."""
        return self.process.wait(seconds)

    def metrics(self) -> dict[str, float]:
        """Every series without a label of its own, and the sum over those that have one."""
        totals: dict[str, float] = {}
        text = httpx.get(self.url + "/metrics", timeout=30).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return totals

    def load(self) -> tuple[float, float, float]:
        """Requests running, requests waiting, and the share of KV blocks in use."""
        found = self.metrics()
        return (
            found["vllm:num_requests_running"],
            found["vllm:num_requests_waiting"],
            found["vllm:gpu_cache_usage_perc"],
        )


def wait_until(true: Callable[[], bool], seconds: float = 30.0, every: float = 0.05) -> float:
    """Poll until ``true()``; returns the seconds it took. TimeoutError after ``seconds``."""
    started = time.monotonic()
    while not true():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"still not so after {seconds} s")
        time.sleep(every)
    return time.monotonic() - started


@contextlib.contextmanager
def idle_afterwards(server: Server) -> Iterator[None]:
    """Check that whatever happened inside left no request and no block behind."""
    yield
    wait_until(lambda: server.load() == (0.0, 0.0, 0.0))
