"""Work in children: what hangs, dies or breaks the device costs itself alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aserve.errors import ConfigError, UnsupportedError
from aserve.gpu_check import children
from aserve.gpu_check.children import Unit, _NoDevice
from aserve.gpu_check.machine import Machine
from aserve.gpu_check.results import Row

# A session of tests has threads; the command itself has none when it forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def unit(name: str, body: Callable[[Machine], Any] | None = None, seconds: float = 30, **more: Any) -> Unit:
    def run(machine: Machine) -> Iterator[Row]:
        yield {"begun": os.getpid()}
        if body is not None:
            body(machine)
        yield {"passed": True}

    return Unit(name, {"unit": name}, seconds, run, **more)


def run(
    units: list[Unit], seconds: float = 60, opened: Callable[[], Any] = _NoDevice
) -> tuple[Any, list[Row]]:
    rows: list[Row] = []
    return children.run(units, opened, time.monotonic() + seconds, rows.append), rows


def verdicts(rows: list[Row]) -> dict[str, Any]:
    return {row["unit"]: row.get("error", row["passed"]) for row in rows if "passed" in row}


def hang(machine: Machine) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    time.sleep(1000)


def test_what_fails_does_not_stop_the_rest() -> None:
    def wrong(machine: Machine) -> None:
        raise ConfigError("that cannot work")

    units = [
        unit("first"),
        unit("raises", wrong),
        unit("hangs", hang, seconds=0.5),
        unit("crashes", lambda machine: os.kill(os.getpid(), signal.SIGKILL)),
        unit("exits", lambda machine: os._exit(3)),
        unit("last"),
    ]
    outcome, rows = run(units)
    assert verdicts(rows) == {
        "first": True,
        "raises": "ConfigError: that cannot work",
        "hangs": "no end within 0.5 s",
        "crashes": "its process ended with status -9",
        "exits": "its process ended with status 3",
        "last": True,
    }
    assert (outcome.ended, outcome.left) == (6, [])
    begun = [row["begun"] for row in rows if "begun" in row]
    assert len(begun) == 6, "rows from before a failure are kept"
    assert len(set(begun)) == 4, "a process serves until it fails"
    for process in set(begun):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_a_phase_that_is_late_is_cut(tmp_path: Path) -> None:
    """With everything it started."""

    def slow(machine: Machine) -> None:
        import subprocess

        process = subprocess.Popen(["sleep", "1000"])
        (tmp_path / "pid").write_text(str(process.pid))
        process.wait()

    started = time.monotonic()
    outcome, rows = run([unit("first"), unit("slow", slow, seconds=100), unit("last")], seconds=3)
    assert time.monotonic() - started < 30
    assert outcome.left == ["slow", "last"]
    assert verdicts(rows) == {"first": True}, "lack of time is no failure of a unit"
    limit = time.monotonic() + 10
    while running(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert run([unit("late")], seconds=-1) == (children.Outcome(0, ["late"]), [])


def running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_machine_that_stood_still_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps by a minute at each look at it: work that took seconds is not late."""
    jumps = iter(range(0, 60 * 10_000, 60))
    real = time.monotonic
    monkeypatch.setattr(children.time, "monotonic", lambda: real() + next(jumps))
    rows: list[Row] = []
    units = [unit("a", lambda machine: time.sleep(2.2), seconds=20), unit("b", hang, seconds=3)]
    outcome = children.run(units, _NoDevice, float("inf"), rows.append)
    assert verdicts(rows) == {"a": True, "b": "no end within 3 s"}
    assert outcome.ended == 2


class Breaking(_NoDevice):
    """After one unit nothing works in this process."""

    broken = False

    def wait(self) -> None:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")


def test_a_broken_device_is_opened_anew() -> None:
    def break_it(machine: Any) -> None:
        machine.broken = True

    outcome, rows = run([unit("a"), unit("b", break_it), unit("c")], opened=Breaking)
    assert verdicts(rows)["b"] == "RuntimeError: an illegal memory access was encountered"
    assert verdicts(rows)["c"] is True
    begun = [row["begun"] for row in rows if "begun" in row]
    assert begun[0] == begun[1] != begun[2]
    assert outcome.ended == 3


def test_a_unit_alone_has_a_process_alone() -> None:
    _, rows = run([unit("a", alone=True), unit("b", alone=True), unit("c")])
    assert len({row["begun"] for row in rows if "begun" in row}) == 3
    assert all(verdicts(rows).values())


def test_a_device_that_does_not_open() -> None:
    def refuse() -> Machine:
        raise UnsupportedError("no device")

    outcome, rows = run([unit("a"), unit("b")], opened=refuse)
    assert verdicts(rows) == {"a": "UnsupportedError: no device", "b": "UnsupportedError: no device"}
    assert outcome.ended == 2
    outcome, rows = run([unit("a")], opened=lambda: os._exit(5))
    assert verdicts(rows) == {"a": "its process ended with status 5"}


def test_questions() -> None:
    assert children.ask(lambda: {"answer": 42}, 30) == {"answer": 42}

    def refuse() -> None:
        raise UnsupportedError("not here")

    with pytest.raises(UnsupportedError, match=r"^not here$"):
        children.ask(refuse, 30)
    with pytest.raises(UnsupportedError, match=r"no end within 0.2 s"):
        children.ask(lambda: time.sleep(100), 0.2)
