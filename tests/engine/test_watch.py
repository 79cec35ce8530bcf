"""R5: an engine that hangs is told from one that is busy and from one that is idle."""

from __future__ import annotations

import asyncio
import threading

from aserve.engine import watch
from aserve.engine.watch import Progress
from aserve.messages.params import SamplingParams


def test_work_without_steps_is_a_stall() -> None:
    progress = Progress()
    progress.look(5, 3, 100.0)
    progress.look(5, 3, 101.0)
    assert progress.stalled_for(111.0) == 10.0
    progress.look(6, 3, 112.0)
    assert progress.stalled_for(120.0) == 0.0


def test_a_busy_engine_never_stalls() -> None:
    progress = Progress()
    for second in range(1000):
        progress.look(second // 2, 500, float(second))
        assert progress.stalled_for(second + 0.5) <= 2.0


def test_an_idle_engine_never_stalls() -> None:
    progress = Progress()
    for second in range(0, 10000, 100):
        progress.look(7, 0, float(second))
        assert progress.stalled_for(second + 50.0) == 0.0


async def test_a_step_that_does_not_come_back(make_async, monkeypatch) -> None:
    monkeypatch.setattr(watch.watch_loop_lag, "__defaults__", (0.02,))
    go_on = threading.Event()

    def hang(plan):
        if plan.step_id == 2:
            go_on.wait(20)

    engine = await make_async(before_step=hang)
    assert engine.stalled_for() == 0.0
    stream = await engine.submit("hi", SamplingParams(max_tokens=8, ignore_eos=True))
    async with asyncio.timeout(10):
        while engine.stalled_for() < 0.1:  # noqa: ASYNC110 - the engine hangs: nothing else can tell
            await asyncio.sleep(0.01)
    await engine.check_health()  # it is not dead
    go_on.set()
    assert (await stream.final()).finished
    async with asyncio.timeout(10):
        while engine.stalled_for():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
