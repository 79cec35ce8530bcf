"""A thousand requests given up at random moments, in every way there is, among others that run on."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from aserve.engine.async_engine import AsyncLLMEngine
from aserve.errors import RequestFailedError
from aserve.messages.inputs import OutputKind
from tests.engine.test_async_engine import assert_free, params, run

WAYS = ("close", "abort", "cancel", "leave", "collect", "tokenise", "operator")
KINDS = (OutputKind.DELTA, OutputKind.CUMULATIVE, OutputKind.FINAL_ONLY)
REPEATS = 1000
TOGETHER = 24
KEPT = {seed: f"kept {'x' * seed}" for seed in range(4, 24, 4)}
"""Prompts, by seed, of requests that nobody gives up."""


async def give_up(engine: AsyncLLMEngine, rng: random.Random, number: int) -> str:
    """Begins a request and ends it before its time; returns how."""
    way, name = rng.choice(WAYS), f"request {number}"
    prompt = "shared beginning " * rng.randint(0, 2) + "y" * rng.randint(1, 60)
    options = params(max_tokens=None, seed=number, n=rng.choice((1, 1, 1, 3)))
    kind = rng.choice(KINDS)
    if way == "tokenise":  # its text is so long that a thread does it
        task = asyncio.create_task(engine.encode_prompt("z" * 5000))
        await pause(rng)
        task.cancel()
        await asyncio.wait([task])
        return way
    if way == "leave":
        outputs = engine.generate(prompt, options, name)
        async for _ in outputs:
            if rng.random() < 0.5:
                break
        await outputs.aclose()
        assert name not in engine.engine.core.groups
        return way
    stream = await engine.submit(prompt, options, request_id=name, kind=kind)
    if way == "cancel":
        task = asyncio.create_task(read(stream))
        await asyncio.sleep(0)
        await pause(rng)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        await pause(rng)
        if way == "close":
            stream.close()
        elif way == "abort":
            await engine.abort(name)
            assert [output async for output in stream if output.finished] == []
        elif way == "operator":
            assert engine.end_request(name, "enough")
            with pytest.raises(RequestFailedError, match="enough"):
                await read(stream)
        else:
            del stream  # the collector may run anywhere, so its abort is a task of the loop's
            await asyncio.sleep(0)
    # Not at the next step, nor after the one that computes it now: nothing waits for either.
    assert name not in engine.engine.core.groups and name not in engine.engine.output.states
    return way


async def pause(rng: random.Random) -> None:
    """For anything from no time to that of some steps."""
    moment = rng.random()
    if moment < 0.3:
        return
    for _ in range(rng.randint(1, 6)):
        await asyncio.sleep(0 if moment < 0.6 else rng.random() * 0.003)


async def read(stream: Any) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 400},
        {"num_blocks": 40, "num_swap_blocks": 40, "overlap": 0},
        {"num_blocks": 60, "max_steps": 4},
    ],
    ids=["room", "crowded", "several steps"],
)
async def test_a_thousand_aborts(make_async: Any, options: dict[str, Any]) -> None:
    engine = await make_async(step_time=0.0005, max_num_seqs=16, enable_prefix_caching=True, **options)
    rng = random.Random(11)
    before = await asyncio.gather(*(run(engine, prompt, seed=seed) for seed, prompt in KEPT.items()))
    expected = [output.outputs[0].token_ids for output in before]
    ledger = engine.engine.core.ledger
    ways: list[str] = []
    kept = 0
    while len(ways) < REPEATS:
        numbers = range(len(ways), min(len(ways) + TOGETHER, REPEATS))
        own = asyncio.gather(*(run(engine, prompt, seed=seed) for seed, prompt in KEPT.items()))
        ways += await asyncio.gather(*(give_up(engine, rng, number) for number in numbers))
        assert [output.outputs[0].token_ids for output in await own] == expected
        kept += len(KEPT)
        # Somebody who left has left nothing behind.
        engine.engine.core.verify()
        ledger.verify(live=engine.num_unfinished)
    await asyncio.wait_for(engine.idle(), 10)
    assert_free(engine)
    ledger.verify(live=0)
    assert set(ways) == set(WAYS)
    given_up = REPEATS - ways.count("tokenise")
    assert ledger.received == len(KEPT) + kept + given_up
    assert ledger.finished == len(KEPT) + kept
    assert (ledger.aborted, ledger.rejected, ledger.failed) == (given_up, 0, 0)
    assert len(asyncio.all_tasks()) <= 4
