"""The one loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aserve.engine.llm_engine import LLMEngine


async def run(engine: LLMEngine, wait_for_work: Callable[[], Awaitable[object]], overlap: int) -> None:
    """Schedules step n + 1 while step n is on the device, then commits n; for ever.

    ::

        loop     schedule 1 | schedule 2 | (await) | commit 1, schedule 3 | (await) | commit 2 ...
        device              | step 1 ............. | step 2 ............. | step 3 ...

    With ``overlap`` 0 each step is committed before the next is decided. Requests are added to and
    aborted from the engine directly while this coroutine awaits; both are coroutines of one loop, so
    nothing is locked.
    """
    running = None
    while True:
        plan = engine.schedule()
        issued = (plan, engine.executor.submit(plan)) if plan is not None else None
        if not overlap and issued is not None:
            running, issued = issued, None
        if running is not None:
            done, future = running
            engine.commit(done, await asyncio.wrap_future(future))
        elif issued is None:
            await wait_for_work()
        running = issued
