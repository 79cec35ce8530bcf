"""How the comparison talks to its runners: a JSON object a line each way.

A runner loads its system once and then waits, idle, for the next request, so that runs of several systems
can be taken in turn: A B C A B C.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Handler = Callable[..., dict[str, Any]]


class RunnerError(Exception):
    """The runner could not do what it was asked; the message is its traceback or the end of its log."""


def prompt_ids(index: int, length: int, vocab_size: int) -> list[int]:
    """Prompt ``index`` of the fixed work, the same for every system."""
    draw = random.Random(index)
    high = min(40000, vocab_size)
    return [draw.randrange(100, high) for _ in range(length)]


def serve(start: Callable[[], tuple[dict[str, Any], Mapping[str, Handler]]]) -> None:
    """Answers requests from standard input until it ends.

    start: loads the system; returns facts about it and the functions a request may name.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print: that goes to the log

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        started = time.perf_counter()
        facts, handlers = start()
    except Exception:
        say({"error": traceback.format_exc()})
        return
    say(facts | {"ready_seconds": time.perf_counter() - started})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(handlers[request.pop("op")](**request))
        except Exception:
            say({"error": traceback.format_exc()})


class Runner:
    """A runner's process, from the side that asks. ``facts``: what it said once it was loaded."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environment},
            )
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        pipe = self._process.stdin
        if pipe is None or pipe.closed:
            raise RunnerError("the runner has been closed")
        try:
            pipe.write(json.dumps({"op": op, **arguments}) + "\n")
            pipe.flush()
        except BrokenPipeError:
            raise RunnerError(self._end_of_log()) from None
        return self._answer()

    def close(self) -> None:
        """Lets the process end; kills it when it does not."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise RunnerError(self._end_of_log())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RunnerError(answer["error"])
        return answer

    def _end_of_log(self) -> str:
        return f"the process ended; the end of {self._log}:\n" + self._log.read_text()[-2000:]
