"""Work in processes that can be killed: a kernel that hangs or breaks the device costs only itself."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from aserve.errors import AserveError, UnsupportedError
from aserve.gpu_check.machine import Machine
from aserve.gpu_check.results import Row

# A fork keeps the seconds that importing torch takes. The parent never touches the device, so a child may.
_FORK = multiprocessing.get_context("fork")
START_SECONDS = 90.0


@dataclass(frozen=True)
class Unit:
    """A piece of a phase that is killed alone.

    about: what its rows have in common, "kind" among it; also the row written where it fails.
    seconds: how long it may take. alone: whether its process ends with it, and gives all memory back.
    """

    name: str
    about: Row
    seconds: float
    run: Callable[[Machine], Iterator[Row]]
    alone: bool = False


@dataclass
class Outcome:
    """Units that ended, and the names of those that the time did not suffice for."""

    ended: int = 0
    left: list[str] = field(default_factory=list)


class _Child:
    def __init__(self, units: Sequence[Unit], opened: Callable[[], Machine]) -> None:
        self.answers, far = _FORK.Pipe(duplex=False)
        self.process = _FORK.Process(target=_work, args=(units, opened, far), daemon=False)
        sys.stdout.flush()
        sys.stderr.flush()
        self.process.start()
        far.close()

    def kill(self) -> None:
        """With what it started itself."""
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        # A process inside the driver may not die: it is left behind rather than waited for.
        self.process.join(10)
        self.answers.close()


def _work(units: Sequence[Unit], opened: Callable[[], Machine], parent: Connection) -> None:
    os.setpgid(0, 0)
    try:
        machine = opened()
    except Exception as error:
        parent.send(("unopened", said(error)))
        return
    for unit in units:
        parent.send(("begin", None))
        failed = broken = False
        try:
            for row in unit.run(machine):
                parent.send(("row", row))
        except Exception as error:
            failed = True
            if not isinstance(error, AserveError):
                traceback.print_exc()
            parent.send(("error", said(error)))
        try:
            machine.wait()
        except RuntimeError as error:
            broken = True  # nothing works on this device in this process any more
            if not failed:
                parent.send(("error", said(error)))
        parent.send(("end", None))
        if broken or unit.alone:
            return


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip()[:300]


def run(
    units: Sequence[Unit],
    opened: Callable[[], Machine],
    until: float,
    put: Callable[[Row], None],
) -> Outcome:
    """Runs the units until that moment of ``time.monotonic``; ``put`` is given each row at once.

    A unit that raises, exceeds its time or ends its process leaves a row that says so, not passed, and the
    rest goes on. A moment that comes too early leaves units out.
    """
    outcome, at = Outcome(), 0
    while at < len(units) and time.monotonic() < until:
        child = _Child(units[at:], opened)
        try:
            ended, reason = _follow(child, units[at:], until, put)
        finally:
            child.kill()
        at += ended
        outcome.ended += ended
        if reason is not None and at < len(units) and time.monotonic() < until:
            put({**units[at].about, "passed": False, "error": reason})
            at += 1
            outcome.ended += 1
    outcome.left = [unit.name for unit in units[at:]]
    return outcome


def _follow(
    child: _Child, units: Sequence[Unit], until: float, put: Callable[[Row], None]
) -> tuple[int, str | None]:
    """Takes a child's rows; the number of units that ended, and what became of the next one, if known."""
    ended, begun, patience = 0, False, START_SECONDS
    while ended < len(units):
        now = time.monotonic()
        if now >= until:
            return ended, None
        if patience <= 0:
            return ended, f"no end within {units[ended].seconds:g} s" if begun else "the device did not open"
        # In short waits: while the whole machine stood still, the child had no more time than one of them.
        wait = min(patience, until - now, 1.0)
        came = child.answers.poll(wait)
        patience -= min(time.monotonic() - now, wait + 0.1)
        if not came:
            continue
        try:
            kind, value = child.answers.recv()
        except EOFError:
            child.process.join(10)
            died = child.process.exitcode
            # Between units it may end: what it did broke the device for the process.
            return ended, f"its process ended with status {died}" if begun or not ended else None
        if kind == "begin":
            begun, patience = True, units[ended].seconds
        elif kind == "row":
            put({**units[ended].about, **value})
        elif kind == "error":
            put({**units[ended].about, "passed": False, "error": value})
        elif kind == "unopened":
            return ended, value
        else:
            ended, begun, patience = ended + 1, False, START_SECONDS
            if units[ended - 1].alone:
                return ended, None
    return ended, None


class _NoDevice:
    """For questions that open what they need themselves."""

    dry, device, ops, l2 = True, "cpu", None, 0

    def describe(self) -> dict[str, Any]:
        return {}

    def properties(self) -> dict[str, Any]:
        return {}

    def wait(self) -> None:
        pass

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
        return call

    def seconds(self, call: Callable[[], Any]) -> float:
        raise RuntimeError("no device was opened")


def ask(question: Callable[[], Any], seconds: float) -> Any:
    """The answer of a function run in a child. UnsupportedError: what it raised, or that it gave none."""

    def answer(machine: Machine) -> Iterator[Row]:
        try:
            yield {"answer": question()}
        except AserveError as error:
            yield {"error": str(error)}

    found: list[Row] = []
    unit = Unit("question", {}, seconds, answer)
    run([unit], _NoDevice, math.inf, found.append)
    if not found or "answer" not in found[0]:
        raise UnsupportedError(found[0]["error"] if found else f"no answer within {seconds:g} s")
    return found[0]["answer"]
