"""What guided decoding costs: ``python -m aserve.bench.guided``.

Two measurements, each on an engine of its own in this process:

tokens  a batch of requests writes the same number of tokens with and without a guide, in turn: time per
        output token of both, for likeliest tokens and for drawn ones
cold    streams decode while requests with schemas of 5 kB that nobody has seen arrive one after another:
        time to their first token, a plain request's beside it, and the streams' time between tokens
        before and meanwhile
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from typing import Any

import numpy as np

from aserve.bench.policies import prompt, started
from aserve.engine.async_engine import AsyncLLMEngine
from aserve.messages.inputs import OutputKind
from aserve.messages.params import GuidedParams, SamplingParams
from aserve.threads import calm_threads

SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 500,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "kind": {"enum": ["car", "ship", "plane"]},
            "price": {"type": "number"},
            "count": {"type": "integer"},
            "new": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        },
        "required": ["name", "kind", "price", "count", "new", "tags"],
        "additionalProperties": False,
    },
}
"""Never done with before the tokens are: plain and guided requests write equally many."""


def cold_schema(number: int, size: int = 5000) -> dict[str, Any]:
    """A schema of ``size`` bytes, as a tool with many arguments has, unlike that of any other ``number``."""
    properties: dict[str, Any] = {}
    for i in itertools.count():
        kinds: list[dict[str, Any]] = [
            {"type": "string", "maxLength": 40, "description": f"text {i} of request {number}"},
            {"type": "integer", "minimum": 0, "maximum": 10_000 + i},
            {"enum": [f"choice {i}", f"other {number}", None]},
            {"type": "array", "items": {"type": "number"}, "maxItems": 5},
            {"type": "object", "properties": {f"inner_{i}": {"type": "boolean"}}},
        ]
        properties[f"argument_{number}_{i}"] = kinds[i % 5]
        schema = {"type": "object", "properties": properties, "required": list(properties),
                  "additionalProperties": False}  # fmt: skip
        if len(json.dumps(schema)) >= size:
            return schema
    raise AssertionError("a count does not end")


async def seconds_per_token(engine: AsyncLLMEngine, params: SamplingParams, streams: int) -> float:
    """Median seconds between outputs of ``streams`` requests that decode together."""

    async def one(number: int) -> list[float]:
        own = params.clone()
        if own.temperature:
            own.seed = number
        stream = await engine.submit(None, own, prompt_token_ids=prompt(32, number), kind=OutputKind.DELTA)
        return [time.perf_counter() async for _ in stream]

    came = await asyncio.gather(*(one(number) for number in range(streams)))
    first, last = max(each[0] for each in came), min(each[-1] for each in came)
    tokens = params.max_tokens or 1
    found = [(each[-1] - each[0]) / (tokens - 1) for each in came]
    if last <= first:
        raise RuntimeError("the requests did not run together")
    return float(np.median(found))


async def tokens(model: str, streams: int, count: int, rounds: int, **options: Any) -> dict[str, Any]:
    """Milliseconds per output token, the median of ``rounds``, and the growth by the guide in percent."""
    engine = await started(model=model, max_num_seqs=streams, **options)
    result: dict[str, Any] = {}
    try:
        for name, temperature in (("likeliest", 0.0), ("drawn", 0.8)):
            kinds = {
                kind: SamplingParams(
                    temperature=temperature, max_tokens=count, ignore_eos=True, guided=guided
                )
                for kind, guided in (("plain", None), ("guided", GuidedParams(json=SCHEMA)))
            }
            for params in kinds.values():
                await seconds_per_token(engine, params, streams)
            measured: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(rounds):
                for kind, params in kinds.items():
                    measured[kind].append(await seconds_per_token(engine, params, streams))
            found = {kind: 1e3 * float(np.median(values)) for kind, values in measured.items()}
            growth = [100 * (b / a - 1) for a, b in zip(measured["plain"], measured["guided"], strict=True)]
            result[name] = {
                "plain_ms": round(found["plain"], 3),
                "guided_ms": round(found["guided"], 3),
                "growth_percent": round(float(np.median(growth)), 1),
            }
    finally:
        await engine.stop()
    return result


async def cold(model: str, streams: int, schemas: int, **options: Any) -> dict[str, Any]:
    """Milliseconds to the first token of plain requests and of those with a schema nobody has seen, and
    what streams that decode meanwhile feel of either."""
    engine = await started(model=model, max_num_seqs=streams + 1, **options)

    async def first(params: SamplingParams) -> tuple[float, float]:
        begun = time.perf_counter()
        stream = await engine.submit(None, params, prompt_token_ids=prompt(32, 999), kind=OutputKind.DELTA)
        came = [time.perf_counter() async for _ in stream]
        return begun, came[0]

    came: list[list[float]] = [[] for _ in range(streams)]

    async def endless(number: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)
        stream = await engine.submit(None, params, prompt_token_ids=prompt(64, number + 1))
        async for _ in stream:
            came[number].append(time.perf_counter())

    spans: dict[str, list[tuple[float, float]]] = {"plain": [], "cold": []}
    try:
        await first(SamplingParams(temperature=0, max_tokens=4, guided=GuidedParams(json=cold_schema(0))))
        running = [asyncio.create_task(endless(number)) for number in range(streams)]
        await asyncio.sleep(1.0)
        for number in range(1, schemas + 1):
            guided = GuidedParams(json=cold_schema(number))
            for name, guide in (("plain", None), ("cold", guided)):
                spans[name].append(await first(SamplingParams(temperature=0, max_tokens=1, guided=guide)))
                await asyncio.sleep(0.1)
        if any(task.done() for task in running):
            raise RuntimeError("the streams ended too early to be measured")
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    finally:
        await engine.stop()
    result: dict[str, Any] = {}
    for name, found in spans.items():
        took = [1e3 * (last - begun) for begun, last in found]
        felt = [gap for begun, last in found for gap in within(came, begun, last)]
        result[name] = {
            "ttft_ms": {"p50": round(float(np.median(took)), 1), "max": round(max(took), 1)},
            "streams_gap_ms": {f"p{p}": round(float(np.percentile(felt, p)), 1) for p in (50, 99)},
        }
    return result


def within(came: list[list[float]], first: float, last: float) -> list[float]:
    """Milliseconds between outputs of one stream that overlap the time asked about."""
    return [
        1e3 * (after - before)
        for each in came
        for before, after in itertools.pairwise(each)
        if first <= after and before <= last
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m aserve.bench.guided", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("which", nargs="*", help="tokens, cold; none for both")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schemas", type=int, default=20)
    options = parser.parse_args(argv)
    measurements = {
        "tokens": lambda: tokens(options.model, options.streams, options.tokens, options.rounds),
        "cold": lambda: cold(options.model, options.streams, options.schemas),
    }
    unknown = set(options.which) - set(measurements)
    if unknown:
        parser.error(f"unknown measurement: {', '.join(sorted(unknown))}")
    calm_threads()
    for name in options.which or measurements:
        print(json.dumps({name: asyncio.run(measurements[name]())}, indent=2), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
