"""What scheduling policies do for latency on this machine: ``python -m aserve.bench.policies``.

Three measurements, each on engines or a server of its own:

interference  streams decode while one long prompt arrives: time between their tokens before and meanwhile,
              with whole prompts, with chunks of the token budget, and with chunks sized by what decodes take
prefix        time to the first token of two requests whose prompts begin alike, the second one's share
overload      many requests thrown at a short queue over HTTP: who is let in, how soon the others are told
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from aserve.args import AsyncEngineArgs
from aserve.bench.client import Client
from aserve.engine.async_engine import AsyncLLMEngine
from aserve.messages.inputs import OutputKind
from aserve.messages.params import SamplingParams

POLICIES: dict[str, dict[str, Any]] = {
    "whole prompts": {"enable_chunked_prefill": False},
    "chunks of 512": {"enable_chunked_prefill": True},
    "chunks by decodes": {"enable_chunked_prefill": True, "max_decode_slowdown": 1.7},
}


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, 40_000) for _ in range(length)]


async def started(**options: Any) -> AsyncLLMEngine:
    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(disable_log_requests=True, **options))
    await engine.start()
    return engine


async def times(engine: AsyncLLMEngine, ids: list[int], tokens: int) -> list[float]:
    """When each output of a greedy request came."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    stream = await engine.submit(None, params, prompt_token_ids=ids, kind=OutputKind.DELTA)
    return [time.perf_counter() async for _ in stream]


def gaps(came: list[list[float]], first: float, last: float) -> dict[str, float]:
    """Percentiles of the milliseconds between outputs of one stream that end between two moments."""
    found = [
        1e3 * (after - before)
        for each in came
        for before, after in itertools.pairwise(each)
        if first <= after and before <= last
    ]
    return {f"p{p}": float(np.percentile(found, p)) for p in (50, 99)} | {"max": max(found)}


async def interference(model: str, streams: int, length: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, options in POLICIES.items():
        engine = await started(model=model, max_num_seqs=streams + 1, **options)
        try:
            await times(engine, prompt(600, 0), 8)  # tells it what steps take
            running = [asyncio.create_task(times(engine, prompt(64, i + 1), 600)) for i in range(streams)]
            await asyncio.sleep(3.0)
            arrived = time.perf_counter()
            (first,) = await times(engine, prompt(length, 999), 1)
            came = await asyncio.gather(*running)
        finally:
            await engine.stop()
        result[name] = {
            "before": gaps(came, arrived - 2.0, arrived),
            "meanwhile": gaps(came, arrived, first),
            "ttft_ms": 1e3 * (first - arrived),
        }
        result[name]["p99_ratio"] = result[name]["meanwhile"]["p99"] / result[name]["before"]["p99"]
    return result


async def prefix(model: str, shared: int, own: int) -> dict[str, Any]:
    engine = await started(model=model, enable_prefix_caching=True, enable_chunked_prefill=True)
    try:
        await times(engine, prompt(shared + own, 0), 4)
        ratios, firsts = [], []
        for i in range(1, 6):
            seconds = []
            for j in range(2):
                begun = time.perf_counter()
                ids = prompt(shared, i) + prompt(own, 100 * i + j)
                seconds.append((await times(engine, ids, 1))[0] - begun)
            ratios.append(seconds[1] / seconds[0])
            firsts.append(1e3 * seconds[0])
    finally:
        await engine.stop()
    return {"first_ttft_ms": float(np.median(firsts)), "share_of_second": float(np.median(ratios))}


async def overload(model: str, limit: int, thrown: int, at_once: int) -> dict[str, Any]:
    port = "8371"
    flags = ["--max-num-seqs", "1", "--max-waiting-requests", str(limit), "--disable-log-requests"]
    command = [sys.executable, "-m", "aserve", "serve", model, "--port", port, *flags]
    quiet = asyncio.subprocess.DEVNULL
    server = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
    client = Client(f"http://127.0.0.1:{port}")
    try:
        await _ready(client)
        body = {"model": model, "prompt": "x", "temperature": 0, "stream": True, "ignore_eos": True}
        endless = {**body, "max_tokens": 2000}
        kept = [asyncio.create_task(client.stream("/v1/completions", endless)) for _ in range(limit + 1)]
        await asyncio.sleep(2.0)
        room = asyncio.Semaphore(at_once)
        taken: list[float] = []
        refused = 0

        async def one() -> None:
            nonlocal refused
            async with room:
                begun = time.perf_counter()
                answer = await client.stream("/v1/completions", endless)
                taken.append(1e3 * (time.perf_counter() - begun))
                refused += answer.error is not None and "429" in answer.error

        await asyncio.gather(*(one() for _ in range(1000)))  # for the memory that any load takes
        before = _resident(server.pid)
        taken.clear()
        refused = 0
        await asyncio.gather(*(one() for _ in range(thrown)))
        after = _resident(server.pid)
        admitted = sum(not task.done() for task in kept)
        for task in kept:
            task.cancel()
    finally:
        server.terminate()
        await server.wait()
    return {
        "thrown": thrown,
        "refused": refused,
        "let in before, one of them running": admitted,
        "refusal_ms": {f"p{p}": float(np.percentile(taken, p)) for p in (50, 99)},
        "grown_mib": (after - before) / 2**20,
    }


async def _ready(client: Client) -> None:
    async with asyncio.timeout(120):
        while True:
            try:
                await client.get("/v1/models")
                return
            except (OSError, ValueError):
                await asyncio.sleep(0.2)


def _resident(pid: int) -> int:
    return 4096 * int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m aserve.bench.policies", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("which", nargs="*", help="interference, prefix, overload; none for all")
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args(argv)
    measurements = {
        "interference": lambda: interference(options.model, 16, 4000),
        "prefix": lambda: prefix(options.model, 1500, 50),
        "overload": lambda: overload(options.model, 100, 5000, 16),
    }
    unknown = set(options.which) - set(measurements)
    if unknown:
        parser.error(f"unknown measurement: {', '.join(sorted(unknown))}")
    for name in options.which or measurements:
        print(json.dumps({name: asyncio.run(measurements[name]())}, indent=2), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
