"""What hostile input costs everybody else: ``python -m aserve.bench.hostile``.

Starts ``aserve serve`` on the packaged SmolLM2 and has 32 streams decode the same prompts again and again.
Once they are left alone, and once every input of :data:`INPUTS` arrives beside them, one after the other:
parameters and JSON of absurd size, guides that explode, requests that are no HTTP. Printed are, for each of
them, the status, the time of the answer and the longest that a stream waited for a token meanwhile, and the
streams' times between tokens without and with.

The exit status is 1 if an answer was 5xx or later than allowed (100 ms; 2 s where a guide is compiled), a
stream said anything else than when it was left alone, its 99th percentile grew by a fifth or more, or the
server ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from aserve.bench.soak import serving

STREAMS = 32
TOKENS = 40
ANSWER_SECONDS = 0.1
GUIDE_SECONDS = 2.0
MOST_GROWTH = 0.2
"""Of the 99th percentile of the time between a stream's tokens."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Input:
    """A request as its bytes, made from the model's name; ``guide``: one is compiled for it. A status in
    ``allowed`` is no failure; by default any below 500 is none."""

    name: str
    make: Callable[[str], bytes]
    guide: bool = False
    allowed: tuple[int, ...] = ()

    def passes(self, status: int) -> bool:
        return status in self.allowed if self.allowed else 200 <= status < 500


def post(path: str, data: bytes, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: h", "Connection: close", f"Content-Length: {len(data)}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def body(name: str, path: str = COMPLETIONS, *, guide: bool = False, **values: Any) -> Input:
    def make(model: str) -> bytes:
        asked: dict[str, Any] = {"model": model, "max_tokens": 2}
        if path == COMPLETIONS:
            asked["prompt"] = "x"
        elif path == CHAT:
            asked["messages"] = [{"role": "user", "content": "x"}]
        return post(path, json.dumps(asked | values).encode())

    return Input(name, make, guide)


def text(name: str, data: str) -> Input:
    return Input(name, lambda model: post(COMPLETIONS, data.encode()), allowed=(400,))


def raw(name: str, data: str, *allowed: int) -> Input:
    return Input(name, lambda model: data.encode("latin-1"), allowed=allowed)


def nested(depth: int, width: int) -> dict[str, Any]:
    """A schema of alternatives within alternatives; with ``width`` 2 it doubles with each level."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        within: dict[str, Any] = {"type": "object", "properties": {"a": schema}}
        other = {"type": "array", "items": schema if width > 1 else {"type": "string"}}
        schema = {"oneOf": [within, other]}
    return schema


def unique() -> dict[str, Any]:
    return {"type": "object", "properties": {f"name_{time.time_ns()}": {"type": "string"}}}


_HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: h\r\n"
_RULES = "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(60)) + 'a60: "x"'
_LOOP = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}

INPUTS: list[Input] = [
    body("n of a billion", n=10**9),
    body("best_of of a billion", best_of=10**9),
    body("a million log-probabilities", logprobs=10**6),
    body("2**63 tokens", max_tokens=2**63),
    body("10,000 stop strings", stop=["x"] * 10_000),
    body("stop strings of 1 MB", stop=["x" * (1 << 20)] * 4),
    body("100,000 biases", logit_bias={str(i): 1 for i in range(100_000)}),
    body("a key of 5,000 digits", logit_bias={"9" * 5000: 1}),
    body("stop tokens out of range", stop_token_ids=[-1, 2**40]),
    body("a million ids", prompt=[1] * 1_000_000),
    body("100,000 prompts", prompt=["x"] * 100_000),
    body("a text of 8 MB", prompt="x" * (8 << 20)),
    body("a text of one 300 kB word", prompt="a" * 300_000),
    body("a chat of 8 MB", CHAT, messages=[{"role": "user", "content": "y " * (4 << 20)}]),
    body("100,000 messages", CHAT, messages=[{"role": "user", "content": ""}] * 100_000),
    body("1,000 tools", CHAT, tools=[{"type": "function", "function": {"name": "f" * 60}}] * 1000),
    body("seed of -2**70", seed=-(2**70)),
    text("JSON 10,000 deep", '{"a":' * 10_000 + "1" + "}" * 10_000),
    text("JSON of brackets", "[" * 1_000_000),
    text("a number of a million digits", '{"model": "x", "prompt": "x", "n": ' + "9" * 1_000_000 + "}"),
    text("NaN", '{"model": "x", "prompt": "x", "temperature": NaN}'),
    text("no JSON", "\x00" * 1000),
    body("a schema that doubles", guide=True, guided_json=nested(8, 2)),
    body("a schema 30 deep", guide=True, guided_json=nested(30, 1)),
    body("a schema in a circle", guide=True, guided_json=_LOOP),
    body("10 MB of choices", guide=True, guided_choice=[f"choice {i}" for i in range(400_000)]),
    body("a regex that explodes", guide=True, guided_regex="(a|aa)+$"),
    body("a regex of 100,000 repeats", guide=True, guided_regex="a{1,100000}"),
    body("a regex of many repeats", guide=True, guided_regex="((a{1,100}){1,100}){1,100}"),
    body("a regex 50,000 deep", guide=True, guided_regex="(" * 50_000 + "a" + ")" * 50_000),
    body("a pattern in a schema", guide=True, guided_json={"type": "string", "pattern": "(.*.*){9,99}x"}),
    body("a grammar that doubles", guide=True, guided_grammar=_RULES),
    body("a format that is none", CHAT, response_format={"type": "json_schema", "json_schema": 5}),
    body("a schema nobody has seen", guide=True, guided_json=unique()),
    body("a million tokens to decode", "/detokenize", tokens=[1] * 1_000_000),
    body("8 MB to tokenise", "/tokenize", prompt="z" * (8 << 20)),
    body("100,000 inputs to embed", "/v1/embeddings", input=["x"] * 100_000),
    body("a model's name of 1 MB", model="m" * (1 << 20)),
    raw("a header of 64 kB", "GET /health HTTP/1.1\r\nHost: h\r\nX: " + "a" * 65_536 + "\r\n\r\n", 400, 431),
    raw("1,000 headers", "GET /health HTTP/1.1\r\nHost: h\r\n" + "X: a\r\n" * 1000 + "\r\n", 400, 431),
    raw("1 GB announced", _HEAD + "Content-Length: 1000000000\r\n\r\n", 413),
    raw("two lengths", _HEAD + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
    raw("chunks and a length", _HEAD + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    raw("a chunk that is none", _HEAD + "Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    raw("compressed", _HEAD + "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 415),
    raw("no HTTP", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400),
]  # fmt: skip


async def send(port: int, data: bytes) -> int:
    """The status of the answer; 0 if the connection was closed without one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        head = await asyncio.wait_for(reader.read(64), 60)
    except ConnectionError:
        return 0
    finally:
        writer.transport.abort()
    found = re.match(rb"HTTP/1\.1 (\d{3})", head)
    return int(found[1]) if found else 0


class Victim:
    """A stream after the other of one prompt; ``spans``: from one of its events to the next."""

    def __init__(self, port: int, model: str, number: int) -> None:
        asked = {"model": model, "prompt": f"Once upon a time, number {number}", "max_tokens": TOKENS}
        asked |= {"stream": True, "ignore_eos": True, "temperature": 0.7 * (number % 2), "seed": number}
        self._request = post(COMPLETIONS, json.dumps(asked).encode())
        self._port = port
        self.spans: list[tuple[float, float]] = []
        self.texts: set[str] = set()

    async def once(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._request)
        last, told = None, ""
        try:
            while line := await reader.readline():
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                if last is not None:
                    self.spans.append((last, now))
                last = now
                event = json.loads(line[6:])
                told += event["choices"][0]["text"] if "choices" in event else json.dumps(event)
        finally:
            writer.close()
        self.texts.add(told)

    async def until(self, over: asyncio.Event) -> None:
        while not over.is_set():
            await self.once()


async def beside(victims: list[Victim], work: Callable[[], Any]) -> None:
    """Has the victims stream for as long as ``work`` takes."""
    over = asyncio.Event()
    running = [asyncio.create_task(victim.until(over)) for victim in victims]
    try:
        await work()
    finally:
        over.set()
    await asyncio.gather(*running)


async def run(args: argparse.Namespace) -> int:
    flags = ["--disable-log-requests", "--max-num-seqs", str(STREAMS + 8), "--port", "0"]
    command = [sys.executable, "-m", "aserve", "serve", args.model, *flags]
    wrong: list[str] = []
    found: list[tuple[str, int, float, float]] = []

    async with serving(command) as server:
        pid = server.process.pid
        # Made before anybody streams: the streams' clocks are read by this process.
        chosen = [(each, each.make(args.model)) for each in INPUTS if args.only in each.name]

        async def attack() -> None:
            for each, data in chosen:
                begun = time.perf_counter()
                status = await send(server.port, data)
                seconds = time.perf_counter() - begun
                found.append((each.name, status, begun, seconds))
                if not each.passes(status):
                    wrong.append(f"{each.name}: status {status}")
                if seconds > (GUIDE_SECONDS if each.guide else ANSWER_SECONDS):
                    wrong.append(f"{each.name}: answered after {seconds:.3f} s")
                await asyncio.sleep(args.pause)

        def victims() -> list[Victim]:
            return [Victim(server.port, args.model, number) for number in range(STREAMS)]

        if not chosen:
            raise SystemExit(f"no input is called anything with {args.only!r}")
        first, alone, attacked = victims(), victims(), victims()
        await asyncio.gather(*(victim.once() for victim in first))
        await beside(alone, lambda: asyncio.sleep(args.alone))
        await beside(attacked, attack)
        if server.process.returncode is not None or server.process.pid != pid:
            wrong.append("the server has ended")
    spans = [span for victim in attacked for span in victim.spans]
    for name, status, begun, seconds in found:
        ended = begun + seconds
        felt = max((last - first for first, last in spans if first < ended and begun < last), default=0)
        print(f"{name:40} {status:4} {1e3 * seconds:8.1f} ms, streams waited {1e3 * felt:6.1f} ms")
    for number, (before, after) in enumerate(zip(alone, attacked, strict=True)):
        if len(before.texts) != 1 or before.texts != after.texts:
            wrong.append(f"stream {number} said something else")
    figures = {}
    for name, group in (("without", alone), ("with", attacked)):
        gaps = [last - first for victim in group for first, last in victim.spans]
        figures[name] = float(np.percentile(gaps, 99))
        shown = ", ".join(f"p{p} {1e3 * float(np.percentile(gaps, p)):.1f}" for p in (50, 90, 99))
        print(f"between tokens {name:8} {shown}, at most {1e3 * max(gaps):.1f} ms ({len(gaps)} tokens)")
    growth = figures["with"] / figures["without"] - 1
    print(f"growth of the 99th percentile {100 * growth:.1f} %")
    if growth >= MOST_GROWTH:
        wrong.append(f"the 99th percentile grew by {100 * growth:.0f} %")
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m aserve.bench.hostile", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--alone", type=float, default=20.0, help="seconds that the streams are left alone")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between one input and the next")
    parser.add_argument("--only", default="", help="inputs whose name holds this")
    return asyncio.run(run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
