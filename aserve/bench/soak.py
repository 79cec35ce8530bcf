"""Mixed traffic against a real server for a long time: does it stay as it was?

``python -m aserve.bench.soak --minutes 30`` starts ``aserve serve`` on the packaged SmolLM2 and has clients
send everything at once: streams and whole answers, chats and completions, several choices, log
probabilities, stop strings, wrong requests, clients that leave in the middle, and clients that do not read.
``--flood N`` sends N requests instead, with an executor that computes nothing, so that the front end and the
scheduler see in minutes what takes days otherwise.

Every few seconds the server's resident memory, open files, threads, tasks and its own books are read. At the
end it must be idle, its books must balance (every request received was finished, aborted, rejected or
failed), and after the warm-up nothing may have grown: memory by less than ``--slope`` MB an hour, and files,
threads and tasks not at all. The exit status is 0 if so and 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 5.0
START_SECONDS = 180.0
SETTLE_SECONDS = 60.0
WARM_UP = 0.3
"""Share of the run after which nothing may grow any more."""

CROWD, CROWD_SHARE = 4, 0.2
"""How many times the clients come in the first share of the run: buffers keep the size of the largest batch,
and the largest of a long quiet run would come when chance wants it."""

NOISE_MB = 8.0
"""Growth of memory that a short run may show: arenas of the allocator, and caches that fill."""

_SLOPE_SAMPLES = 500

_SERIES = re.compile(r"^([a-z:_]+)(?:\{([^}]*)\})? (\S+)$", re.MULTILINE)


@dataclass
class Sample:
    """The server at one moment; ``seconds`` since the start of the traffic."""

    seconds: float
    rss_mb: float
    files: int
    threads: int
    tasks: int
    unfinished: int
    received: int


# ---------------------------------------------------------------- the server, seen from outside


class Server:
    """A server process and its address."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port

    async def metrics(self) -> dict[str, float]:
        """Every series by its name, those with a state or cause by ``name/value`` as well."""
        status, body = await exchange(self.port, request("GET", "/metrics"))
        if status != 200:
            raise RuntimeError(f"/metrics answered {status}")
        found: dict[str, float] = {}
        for name, labels, value in _SERIES.findall(body.decode()):
            split = re.search(r'(?:state|cause)="([^"]*)"', labels)
            found[f"{name}/{split[1]}" if split else name] = float(value)
        return found

    async def sample(self, started: float) -> Sample:
        series = await self.metrics()
        folder = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        return Sample(
            seconds=time.monotonic() - started,
            rss_mb=int(status["VmRSS"].split()[0]) / 1024,
            files=len(os.listdir(folder / "fd")),
            threads=int(status["Threads"]),
            tasks=int(series["aserve:event_loop_tasks"]),
            unfinished=unfinished(series),
            received=int(series["aserve:requests_total/received"]),
        )


def unfinished(series: dict[str, float]) -> int:
    return int(sum(series[f"vllm:num_requests_{state}"] for state in ("running", "waiting", "swapped")))


def imbalance(series: dict[str, float]) -> int:
    """Requests that the server's books do not account for: 0 if all is well."""
    states = ("finished", "aborted", "rejected", "failed")
    ended = sum(series[f"aserve:requests_total/{state}"] for state in states)
    return int(series["aserve:requests_total/received"] - ended - unfinished(series))


@asynccontextmanager
async def serving(command: Sequence[str]) -> AsyncIterator[Server]:
    """Runs ``command``, which logs its address once it serves; ends it with SIGTERM."""
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    stderr = process.stderr
    if stderr is None:
        raise RuntimeError("the server has no standard error")
    last: list[str] = []

    async def address() -> int:
        while line := (await stderr.readline()).decode(errors="replace"):
            last[:] = [*last[-20:], line]
            if found := re.search(r"API at http://[^:/]+:(\d+)", line):
                return int(found[1])
        raise RuntimeError("the server ended:\n" + "".join(last))

    async def swallow() -> None:
        while await stderr.read(1 << 16):
            pass

    try:
        port = await asyncio.wait_for(address(), START_SECONDS)
        reading = asyncio.create_task(swallow())
        yield Server(process, port)
        process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(process.wait(), 60)
        await reading
        if code:
            raise RuntimeError(f"the server ended with status {code}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# ---------------------------------------------------------------- the clients


def request(method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def exchange(
    port: int, data: bytes, *, leave_after: int | None = None, pause: float = 0
) -> tuple[int, bytes]:
    """Sends a request and reads its answer: status (0 without one), body.

    leave_after: bytes after which the connection is cut. pause: seconds for which nothing is read.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12)
    try:
        writer.write(data)
        await writer.drain()
        if pause:
            await asyncio.sleep(pause)
        if leave_after is not None:
            await reader.read(leave_after)
            writer.transport.abort()
            return 0, b""
        answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]) if head else 0, body


WORDS = (
    "river",
    "stone",
    "bridge",
    "over",
    "under",
    "while",
    "rain",
    "came",
    "slowly",
    "nobody",
    "said",
    "why",
)


KINDS = {
    "chat": 20, "completion": 20, "choices": 6, "logprobs": 6, "stop": 6, "wrong": 8, "leaves": 20, "slow": 2,
    "tokenize": 6,
}  # fmt: skip
"""What is asked for, and how often."""


def traffic(
    random_: random.Random, model: str, most_tokens: int, kinds: dict[str, int]
) -> tuple[str, bytes, dict[str, Any]]:
    """One request: its kind, its bytes, and how its client behaves."""
    kind = random_.choices(list(kinds), list(kinds.values()))[0]
    text = " ".join(random_.choices(WORDS, k=random_.choice((4, 12, 60, 200))))
    body: dict[str, Any] = {"model": model, "max_tokens": random_.randint(1, most_tokens)}
    body |= {"stream": random_.random() < 0.6, "temperature": random_.choice((0, 0.8))}
    behaviour: dict[str, Any] = {}
    path = "/v1/completions"
    if kind == "chat":
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": text}]
    elif kind == "tokenize":
        path, body = "/tokenize", {"model": model, "prompt": text}
    else:
        body["prompt"] = text
    if kind == "choices":
        body |= {"n": 3, "temperature": 1.0}
    elif kind == "logprobs":
        body |= {"logprobs": 3, "echo": random_.random() < 0.5}
    elif kind == "stop":
        body["stop"] = [" the", "."]
    elif kind == "wrong":
        body |= random_.choice(
            ({"n": 10**9}, {"temperature": -1}, {"prompt": []}, {"model": "none"}, {"top_p": 7})
        )
    elif kind == "leaves":
        body |= {"stream": random_.random() < 0.7, "max_tokens": 4 * most_tokens}
        behaviour["leave_after"] = random_.randint(1, 2000)
    elif kind == "slow":
        body["stream"] = True
        behaviour["pause"] = random_.random()
    return kind, request("POST", path, body), behaviour


EXPECTED = {"wrong": {400, 404}, "leaves": {0}}


class Traffic:
    """What the clients have done so far."""

    def __init__(
        self, port: int, model: str, most_tokens: int, seed: int, kinds: dict[str, int] = KINDS
    ) -> None:
        self._kinds = kinds
        self.counts: Counter[str] = Counter()
        self.surprises: Counter[str] = Counter()
        self._port, self._model, self._most_tokens = port, model, most_tokens
        self._random = random.Random(seed)

    async def one(self) -> None:
        kind, data, behaviour = traffic(self._random, self._model, self._most_tokens, self._kinds)
        try:
            async with asyncio.timeout(300):
                status, body = await exchange(self._port, data, **behaviour)
        except (OSError, TimeoutError) as error:
            self.surprises[f"{kind}: {type(error).__name__}"] += 1
            return
        self.counts[kind] += 1
        if status not in EXPECTED.get(kind, {200}):
            self.surprises[f"{kind}: status {status}"] += 1
        elif status == 200 and (at := body.find(b'{"error"')) >= 0:
            self.surprises[f"{kind}: error event {body[at : at + 300].decode(errors='replace')}"] += 1

    async def until(self, ends: float, most: int | None) -> None:
        """One client: requests one after the other until the time or the number is reached."""
        while time.monotonic() < ends and (most is None or self.counts.total() < most):
            await self.one()


# ---------------------------------------------------------------- the verdict


def slope(samples: Sequence[Sample], name: str) -> float:
    """Growth an hour: the median of the slopes between any two samples (Sen 1968).

    A leak goes on, and every slope shows it. An allocator's heap grows in steps, when a large block finds no
    gap wide enough; one step does not move the median, a staircase of them does.
    """
    some = samples[:: -(-len(samples) // _SLOPE_SAMPLES)]
    slopes = [
        (getattr(late, name) - getattr(early, name)) / (late.seconds - early.seconds) * 3600
        for early, late in itertools.combinations(some, 2)
        if late.seconds > early.seconds
    ]
    return statistics.median(slopes) if slopes else 0.0


def verdict(samples: Sequence[Sample], idle: tuple[Sample, Sample], most_slope: float) -> list[str]:
    """What is wrong; [] if nothing is.

    samples: during the traffic. idle: before it and, with nobody connected, after it.
    """
    wrong = []
    late = [sample for sample in samples if sample.seconds >= WARM_UP * samples[-1].seconds]
    hours = (late[-1].seconds - late[0].seconds) / 3600
    growth = slope(late, "rss_mb")
    # In a short run the noise of a sample outweighs any leak: the growth itself is looked at as well.
    if growth > most_slope and growth * hours > NOISE_MB:
        wrong.append(f"memory grows by {growth:.2f} MB an hour ({growth * hours:.1f} MB seen)")
    before, after = idle
    for name, allowed in (("files", 2), ("threads", 4), ("tasks", 2)):
        if getattr(after, name) > getattr(before, name) + allowed:
            wrong.append(f"{name}: {getattr(before, name)} before, {getattr(after, name)} after")
    if after.unfinished:
        wrong.append(f"{after.unfinished} requests are unfinished although nobody is connected")
    return wrong


async def run(args: argparse.Namespace) -> int:
    most = args.flood or None
    async with serving(command(args)) as server:
        kinds = dict(KINDS)
        if most is not None:
            del kinds["logprobs"]  # the fake executor has none
        for _ in range(3):
            await Traffic(
                server.port, args.model, 4, 0, {"chat": 1}
            ).one()  # what the first requests bring up is no growth
        started = time.monotonic()
        before = await server.sample(started)
        load = Traffic(server.port, args.model, args.tokens, args.seed, kinds)
        seconds = 60 * args.minutes if most is None else float("inf")
        clients = [
            asyncio.create_task(load.until(started + share * seconds, most and int(share * most)))
            for share, count in ((1.0, args.clients), (CROWD_SHARE, (CROWD - 1) * args.clients))
            for _ in range(count)
        ]
        samples: list[Sample] = []
        wrong: list[str] = []
        while not all(client.done() for client in clients):
            await asyncio.wait(clients, timeout=SAMPLE_SECONDS)
            samples.append(await server.sample(started))
            if off := imbalance(await server.metrics()):
                wrong.append(f"after {samples[-1].seconds:.0f} s the books are off by {off} requests")
            print(json.dumps(asdict(samples[-1])), flush=True)
        for client in clients:
            client.result()
        settled = time.monotonic() + SETTLE_SECONDS
        while unfinished(await server.metrics()) and time.monotonic() < settled:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.0)
        after = await server.sample(started)
        wrong += verdict(samples, (before, after), args.slope)
        if off := imbalance(await server.metrics()):
            wrong.append(f"at the end the books are off by {off} requests")
    wrong += [f"{what}: {count} times" for what, count in sorted(load.surprises.items())]
    report(args, load, [before, *samples, after], wrong)
    return 1 if wrong else 0


def report(args: argparse.Namespace, load: Traffic, samples: Sequence[Sample], wrong: Sequence[str]) -> None:
    first, last = samples[0], samples[-1]
    print(f"{load.counts.total()} exchanges in {last.seconds:.0f} s: {dict(load.counts)}")
    for name in ("rss_mb", "files", "threads", "tasks"):
        before, after = getattr(first, name), getattr(last, name)
        highest = max(getattr(sample, name) for sample in samples)
        print(f"{name:8} {before:8.1f} before {after:8.1f} after {highest:8.1f} at most")
    late = [sample for sample in samples[1:-1] if sample.seconds >= WARM_UP * last.seconds]
    if late:
        grown, rate = late[-1].rss_mb - late[0].rss_mb, slope(late, "rss_mb")
        print(f"after the warm-up memory grew by {grown:.1f} MB, at a slope of {rate:.2f} MB an hour")
    for line in wrong:
        print(f"WRONG: {line}")
    if args.output:
        found = {"samples": [asdict(each) for each in samples], "counts": load.counts, "wrong": wrong}
        with suppress(OSError):
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(found, indent=1))


def command(args: argparse.Namespace) -> list[str]:
    flags = ["--disable-log-requests", "--max-num-seqs", "32", "--port", "0"]
    flags += ["--num-gpu-blocks-override", "512"]  # a small cache: all of its pages are soon in memory
    if args.flood:
        return [sys.executable, "-m", "aserve.bench.flood_server", args.model, *flags]
    return [sys.executable, "-m", "aserve", "serve", args.model, *flags]


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m aserve.bench.soak", description=summary)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument(
        "--flood", type=int, default=0, metavar="N", help="N requests on a fake executor instead"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of an answer")
    parser.add_argument("--slope", type=float, default=1.0, help="most growth of memory, MB an hour")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file for the samples")
    return asyncio.run(run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
