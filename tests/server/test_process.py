"""What a process that is only a server changes about itself."""

from __future__ import annotations

import gc
import os
import sys
import threading

import pytest

from aserve.errors import ConfigError
from aserve.server import process


def test_settling_takes_what_is_there_from_the_collector() -> None:
    before = gc.get_threshold()
    try:
        process.settle()
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold() == process.COLLECT_AFTER
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


@pytest.mark.parametrize(("given", "nice"), [(None, 0), ("", 0), ("0", 0), (" 7 ", 7), ("19", 19)])
def test_niceness_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, given: str | None, nice: int
) -> None:
    monkeypatch.delenv(process.NICE_VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(process.NICE_VARIABLE, given)
    assert process.loop_nice() == nice


@pytest.mark.parametrize("given", ["-1", "20", "nice", "1.5"])
def test_other_niceness_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(process.NICE_VARIABLE, given)
    with pytest.raises(ConfigError, match=process.NICE_VARIABLE):
        process.loop_nice()


@pytest.mark.skipif(sys.platform != "linux", reason="niceness belongs to a thread on Linux only")
def test_niceness_is_the_calling_threads_alone() -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    wanted = min(19, own + 3)
    seen: list[int] = []

    def run() -> None:
        process.yield_to_compute(wanted)
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [wanted]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
