"""What a running engine finds out about itself by looking now and then, at no cost to its steps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aserve.engine.stats import EngineStats

LAG_INTERVAL = 0.25
"""Seconds between two looks."""


class Progress:
    """Tells an engine that hangs from one that is busy: its steps are counted, not timed.

    A look compares the number of steps issued with that of the look before. Work that is there while the
    number stands still is a stall, whatever the reason; a busy engine moves on, and an idle one has no work.
    """

    def __init__(self) -> None:
        self._steps = -1
        self._since: float | None = None

    def look(self, steps: int, unfinished: int, now: float) -> None:
        """``steps`` issued so far, requests ``unfinished``, and the seconds of a steady clock."""
        if steps != self._steps or not unfinished:
            self._steps, self._since = steps, None
        elif self._since is None:
            self._since = now

    def stalled_for(self, now: float) -> float:
        """Seconds since the first look that found no new step although there was work."""
        return 0.0 if self._since is None else max(0.0, now - self._since)


async def watch_loop_lag(stats: EngineStats, interval: float = LAG_INTERVAL) -> AsyncIterator[None]:
    """Measures, for as long as it is iterated, how late the running loop wakes a sleeper."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval
        await asyncio.sleep(interval)
        stats.on_loop_lag(loop.time() - due)
        yield
