"""CPU time of everything between the engine's step result and the bytes on the socket.

``python -m aserve.bench.frontend`` runs the real server (Hypercorn, our connection class, Quart, the
engine's scheduler and output processor, the packaged model's tokenizer) over an executor that knows
every token in advance, drives it from a second process with keep-alive clients that stream, and reports
the server's CPU seconds, user and system, per request and per streamed token. Two output lengths
separate the two: ``cpu = per_request + length * per_token``. CPU time and not wall time: it means the
same on a busy machine.

The executor's own thread is counted apart; what it costs is the price of the fake. ``--parts`` adds where
the time of the loop's thread goes, from a sampling of its stack by CPU time. ``--compute`` has every step
compute a token of the packaged model for as many sequences as there are clients, and says what serving costs
that step, which needs a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from aserve.bench.frontend_server import TEXT, StackSampler, serve

# ---------------------------------------------------------------- the clients


class _Client(asyncio.Protocol):
    """One keep-alive connection that sends the same request again whenever its stream has ended."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._tail = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._next()

    def _next(self) -> None:
        if self._transport is None:
            raise RuntimeError("a client was used before it was connected")
        body = self._run.take()
        if body is None:
            self._transport.close()
            self._run.one_left()
        else:
            self._transport.write(body)

    def data_received(self, data: bytes) -> None:
        run = self._run
        run.reads += 1
        run.events += data.count(b"data: {")
        self._tail = (self._tail + data)[-24:]
        # The last chunk follows the last event, in the same segment or in the next.
        if self._tail.endswith(b"0\r\n\r\n") and b"[DONE]" in self._tail:
            self._tail = b""
            self._next()

    def connection_lost(self, error: Exception | None) -> None:
        self._run.left_early(error)


class _Run:
    """One measurement: ``requests`` requests of one output length over ``clients`` connections."""

    def __init__(self, requests: int, bodies: Sequence[bytes]) -> None:
        self.events = self.reads = 0
        self._left = requests
        self._bodies = bodies
        self._open = 0
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self) -> bytes | None:
        if self._left == 0:
            return None
        self._left -= 1
        return self._bodies[self._left % len(self._bodies)]

    def one_left(self) -> None:
        self._open -= 1
        if not self._open:
            self._done.set_result(None)

    def left_early(self, error: Exception | None) -> None:
        if not self._done.done() and self._left:
            self._done.set_exception(error or ConnectionError("the server closed a connection"))

    async def run(self, port: int, clients: int) -> None:
        loop = asyncio.get_running_loop()
        self._open = clients
        for _ in range(clients):
            await loop.create_connection(lambda: _Client(self), "127.0.0.1", port)
        await self._done


def bodies(model: str, endpoint: str, prompt_tokens: int, length: int) -> list[bytes]:
    """Whole HTTP requests as a usual client library sends them, with prompts of about that many tokens."""
    words = TEXT.split()
    made = []
    for number in range(8):
        text = " ".join(words[(number + at) % len(words)] for at in range(max(1, prompt_tokens * 3 // 4)))
        asked: dict[str, Any] = {"model": model, "max_tokens": length, "stream": True, "ignore_eos": True}
        asked["temperature"] = 0
        if endpoint == "chat":
            asked["messages"] = [{"role": "user", "content": text}]
        else:
            asked["prompt"] = text
        data = json.dumps(asked).encode()
        path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept: application/json\r\n"
            "Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nUser-Agent: OpenAI/Python 1.99\r\n"
            "Content-Type: application/json\r\nAuthorization: Bearer none\r\nX-Stainless-Lang: python\r\n"
            f"X-Stainless-Runtime: CPython\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        made.append(head.encode() + data)
    return made


# ---------------------------------------------------------------- the measurement


@dataclass
class Figures:
    """What one run of ``requests`` requests of ``length`` tokens cost the server, in seconds of CPU."""

    length: int
    requests: int
    cpu: float
    system: float
    executor: float
    step: float
    alone: float
    wall: float
    events: int
    reads: int
    parts: Counter[str]
    lines: Counter[str]

    @property
    def front(self) -> float:
        """Microseconds per request, the executor's thread left out."""
        return (self.cpu - self.executor) / self.requests * 1e6


class Server:
    """The server process and the two pipes to it."""

    def __init__(self, args: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "aserve.bench.frontend", "--role", "server"]
        for name in ("model", "port", "clients", "step_ms"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        command += [f"--{name}" for name in ("parts", "compute") if getattr(args, name)]
        self._log: IO[bytes] = open(args.log, "wb") if args.log else open(os.devnull, "wb")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    async def ready(self, port: int, seconds: float = 60.0) -> None:
        async with asyncio.timeout(seconds):
            while True:
                if self._process.poll() is not None:
                    raise RuntimeError("the server ended; --log FILE keeps what it said")
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.1)
                else:
                    writer.close()
                    return

    def figures(self, sample: bool) -> dict[str, Any]:
        pipes = self._process
        if pipes.stdin is None or pipes.stdout is None:
            raise RuntimeError("the server has no pipes")
        pipes.stdin.write("on\n" if sample else "off\n")
        pipes.stdin.flush()
        found: dict[str, Any] = json.loads(pipes.stdout.readline())
        return found

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(15)
        finally:
            self._process.kill()
            self._log.close()


_SPENT = ("user", "system", "executor", "computed", "steps")


async def one(server: Server, args: argparse.Namespace, length: int, requests: int) -> Figures:
    run = _Run(requests, bodies(args.model, args.endpoint, args.prompt_tokens, length))
    before = server.figures(True)
    started = time.perf_counter()
    await run.run(args.port, args.clients)
    wall = time.perf_counter() - started
    after = server.figures(False)
    spent = {key: after[key] - before[key] for key in _SPENT}
    counts = {
        kind: Counter(after.get(kind, {})) - Counter(before.get(kind, {})) for kind in ("parts", "lines")
    }
    return Figures(
        length,
        requests,
        spent["user"] + spent["system"],
        spent["system"],
        spent["executor"],
        spent["computed"] / max(1, spent["steps"]),
        after["alone"],
        wall,
        run.events,
        run.reads,
        counts["parts"],
        counts["lines"],
    )


async def measure(args: argparse.Namespace) -> tuple[Figures, Figures]:
    """The best of ``--repeats`` runs with a short and with a long output."""
    server = Server(args)
    try:
        await server.ready(args.port)
        await one(server, args, args.short, 4 * args.clients)  # warms caches and connections up
        pairs = []
        for _ in range(args.repeats):
            few = await one(server, args, args.short, args.requests)
            many = await one(server, args, args.long, max(args.clients, args.requests // 4))
            pairs.append((few, many))
    finally:
        server.close()
    return min((a for a, _ in pairs), key=_front), min((b for _, b in pairs), key=_front)


def _front(figures: Figures) -> float:
    return figures.front


def report(args: argparse.Namespace, few: Figures, many: Figures) -> str:
    """The table, in microseconds of CPU."""
    token = (many.front - few.front) / (many.length - few.length)
    request = few.front - token * few.length
    if args.compute:
        return (
            f"a token for each of {args.clients} clients: {many.alone * 1e3:.2f} ms alone, "
            f"{many.step * 1e3:.2f} ms while serving them ({many.step / many.alone - 1:+.1%})"
        )
    whole = [
        f"front-end CPU, {args.endpoint}, {args.clients} clients, {args.step_ms:g} ms per step: "
        f"{token:.1f} us per streamed token, {request:.0f} us per request",
        "",
        "| output | us per request | of it in the kernel | executor apart | events per token | tokens/s |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    whole += [
        f"| {each.length} | {each.front:.0f} | {each.system / each.requests * 1e6:.0f} "
        f"| {each.executor / each.requests * 1e6:.0f} "
        f"| {each.events / (each.requests * each.length):.2f} "
        f"| {each.length * each.requests / each.wall:.0f} |"
        for each in (few, many)
    ]
    if args.parts:
        whole += ["", "| part | us per token | us per request |", "|---|---:|---:|"]
        shares = [
            {part: each.front * count / max(1, each.parts.total()) for part, count in each.parts.items()}
            for each in (few, many)
        ]
        for part in dict.fromkeys(name for name, _ in StackSampler.PARTS):
            low, high = shares[0].get(part, 0.0), shares[1].get(part, 0.0)
            own = (high - low) / (many.length - few.length)
            whole.append(f"| {part} | {own:.2f} | {low - own * few.length:.0f} |")
        total = max(1, many.lines.total())
        whole += ["", f"functions with the most samples at {many.length} tokens:"]
        whole += [f"{100 * n / total:5.1f} %  {name}" for name, n in many.lines.most_common(args.functions)]
    return "\n".join(whole)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m aserve.bench.frontend", description=__doc__.split("\n")[0]
    )
    found.add_argument("--model", default="smollm2", help="whose tokenizer and limits are used")
    found.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    found.add_argument("--clients", type=int, default=32)
    found.add_argument("--requests", type=int, default=512, help="requests of the short run")
    found.add_argument("--repeats", type=int, default=3)
    found.add_argument("--prompt-tokens", type=int, default=128)
    found.add_argument("--short", type=int, default=4, help="output tokens of the short run")
    found.add_argument("--long", type=int, default=132, help="output tokens of the long run")
    found.add_argument("--step-ms", type=float, default=0.0, help="how long each step takes")
    found.add_argument(
        "--compute", action="store_true", help="compute real steps, and say what serving costs them"
    )
    found.add_argument("--port", type=int, default=8377)
    found.add_argument("--parts", action="store_true", help="say where the time goes")
    found.add_argument("--functions", type=int, default=15, help="functions listed with --parts")
    found.add_argument("--log", help="file for what the server writes to standard error")
    found.add_argument("--role", choices=("both", "server"), default="both", help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.role == "server":
        return serve(args)
    import uvloop

    print(report(args, *uvloop.run(measure(args))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
