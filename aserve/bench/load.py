"""A server in a process of its own, and the fixed work sent to it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from aserve.bench import metrics, serve
from aserve.bench.client import Client
from aserve.bench.datasets import Request, random_ids
from aserve.bench.runners.wire import RunnerError

_SERVING = re.compile(r"serving .*?(https?://[^/\s]+)")
_START_SECONDS = 120.0


class Server:
    """``aserve serve`` with these flags on a free port of 127.0.0.1, for the length of a ``with``."""

    url = ""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self._command = [*command, "--host", "127.0.0.1", "--port", "0", "--disable-log-requests"]
        self._log = log
        self._environment = {**os.environ, **environment}

    def __enter__(self) -> Server:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as out:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self._environment
            )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            found = _SERVING.search(self._log.read_text(errors="replace"))
            if found:
                self.url = found[1]
                return self
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._end()
                raise RunnerError(f"the server did not start; the end of {self._log}:\n{self._tail()}")
            time.sleep(0.1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


def run(url: str, n: int, input_len: int, output_len: int) -> dict[str, Any]:
    """``n`` clients, each with one streamed request of the fixed work; the result of a runner's ``run``."""

    async def measure() -> tuple[list[Any], float]:
        client = Client(url)
        try:
            model = (await client.get("/v1/models"))["data"][0]["id"]
            payloads = [
                serve.payload(
                    Request(random_ids(i, input_len), input_len, output_len), model, False, ignore_eos=True
                )
                for i in range(n)
            ]
            return await serve.run(client, "/v1/completions", payloads, gaps=[0.0] * n, max_concurrency=n)
        finally:
            client.close()

    answers, seconds = asyncio.run(measure())
    for answer in answers:
        if answer.error is not None:
            raise RunnerError(answer.error)
    return {
        "seconds": seconds,
        "output_tokens": sum(answer.output_tokens for answer in answers),
        "ttft_ms": statistics.median(metrics.samples(answers, "ttft")),
        "tpot_ms": statistics.median(metrics.samples(answers, "tpot")),
        "itl_ms": statistics.median(metrics.samples(answers, "itl")),
    }
