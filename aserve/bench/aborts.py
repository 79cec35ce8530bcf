"""How soon a request is gone once its client is: ``python -m aserve.bench.aborts``.

Serves the packaged SmolLM2 over HTTP in this process, and has clients cut the connection, by FIN and by
RST, of every kind of call in every state a request can be in: queued behind others, computing its prompt,
decoding, having its guide compiled, and being read too slowly. Timed is from the cut to the moment when the
engine knows nothing of the request any more. It must be no more than the longest step and 100 ms, each time;
in the end no KV block may be missing and every request be accounted for. The exit status is 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from aserve.args import AsyncEngineArgs, ServerArgs
from aserve.bench.hostile import post, send
from aserve.server import pipelining
from aserve.server.cli import calm_threads

if TYPE_CHECKING:
    from aserve.engine.async_engine import AsyncLLMEngine

ALLOWED_SECONDS = 0.1
SLOTS = 8
LONG = 400
STATES = ("queued", "prompt", "decoding", "compiling", "slow")

_COMPLETION = {"prompt": "Once upon a time", "max_tokens": LONG, "ignore_eos": True}
_MESSAGES = {"messages": [{"role": "user", "content": "Tell me a story"}], "max_tokens": LONG}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", _COMPLETION),
    "stream": ("/v1/completions", {**_COMPLETION, "stream": True}),
    "n=4": ("/v1/completions", {**_COMPLETION, "n": 4, "temperature": 0.9, "stream": True}),
    "echo": ("/v1/completions", {**_COMPLETION, "echo": True, "logprobs": 1}),
    "chat with tools": ("/v1/chat/completions", {**_MESSAGES, "tools": [_TOOL], "tool_choice": "none"}),
    "responses": ("/v1/responses", {"input": "Tell me a story", "max_output_tokens": LONG, "stream": True}),
    "messages": ("/v1/messages", {**_MESSAGES, "stream": True}),
}


def call(name: str, state: str, number: int, model: str) -> bytes:
    """The bytes of a call that will come into the state."""
    path, asked = CALLS[name]
    asked = {"model": model, **asked}
    if state == "prompt":  # long enough for several steps
        words = " ".join(f"word{number} and {i}" for i in range(500))
        if "messages" in asked:
            asked["messages"] = [{"role": "user", "content": words}]
        else:
            asked["prompt" if "prompt" in asked else "input"] = words
    if state == "compiling":
        asked["guided_regex"] = f"({number}|[a-z]{{1,50}}){{1,20}}"
    return post(path, json.dumps(asked).encode())


class Server:
    """The server under test; ``fillers``: how many streams hold its slots."""

    def __init__(self, engine: AsyncLLMEngine, port: int, model: str) -> None:
        self.async_engine, self.port, self.model = engine, port, model
        if engine.engine is None:
            raise RuntimeError("the engine has not been started")
        self.engine = engine.engine
        self.steps: list[float] = []
        self.fillers = 0
        real = self.engine.commit

        def commit(plan: Any, result: Any) -> None:
            self.steps.append(result.seconds or 0.0)
            real(plan, result)

        self.engine.commit = commit  # type: ignore[method-assign]

    def groups(self) -> set[str]:
        return set(self.engine.core.groups)

    async def until(self, holds: Any, seconds: float = 10.0) -> None:
        ends = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > ends:
                raise TimeoutError(
                    f"waited {seconds:g} s; {len(self.groups())} requests and {self.held()} calls are there"
                )
            await asyncio.sleep(0.0005)

    async def leave(self, name: str, state: str, how: str, number: int) -> float:
        """Seconds from a client's leaving until nothing is left of its request."""
        before = self.groups()
        sock = socket.socket()
        sock.setblocking(False)
        if state == "slow":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", self.port))
        await loop.sock_sendall(sock, call(name, state, number, self.model))
        if state == "compiling":
            guides = self.engine.input.guides
            await self.until(lambda: bool(guides._running) or self.groups() > before)
        else:
            await self.until(lambda: self.groups() > before)
            mine = [self.engine.core.groups[each] for each in self.groups() - before]
            if state in ("decoding", "slow"):
                await self.until(lambda: any(group.first_token_time is not None for group in mine))
                await asyncio.sleep(0.05)
            elif state == "prompt":
                await self.until(lambda: any(group.first_scheduled_time is not None for group in mine))
        if how == "RST":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        left = time.perf_counter()
        await self.until(lambda: self.groups() <= before and not self.held())
        return time.perf_counter() - left

    def held(self) -> int:
        """Calls that a server's connections still answer, but for the fillers'."""
        return len(pipelining.table._busy) - self.fillers


async def fill(server: Server) -> list[socket.socket]:
    """Streams that take every slot, so that whatever follows is queued."""
    loop, kept = asyncio.get_running_loop(), []
    for _ in range(SLOTS):
        sock = socket.socket()
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", server.port))
        asked = {"model": server.model, "prompt": "go on", "max_tokens": 8000, "ignore_eos": True}
        await loop.sock_sendall(sock, post("/v1/completions", json.dumps(asked).encode()))
        kept.append(sock)
    await server.until(lambda: len(server.groups()) == SLOTS)
    return kept


async def measure(args: argparse.Namespace) -> int:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    from aserve.engine.async_engine import AsyncLLMEngine
    from aserve.server.app import create_app
    from aserve.server.serve import listen

    pipelining.install()
    engine = AsyncLLMEngine.from_engine_args(
        AsyncEngineArgs(
            model=args.model, max_num_seqs=SLOTS, disable_log_requests=True, num_gpu_blocks_override=1200
        )
    )
    settings = ServerArgs()
    settings.check()
    app = create_app(None, settings, engine)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    config, stop = Config(), asyncio.Event()
    config.bind, config.errorlog = [f"fd://{listener.detach()}"], None
    task = asyncio.create_task(serve(app, config, shutdown_trigger=stop.wait))
    wrong: list[str] = []
    taken: dict[str, list[float]] = defaultdict(list)
    try:
        async with asyncio.timeout(120):
            while not engine.is_running:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        server = Server(engine, port, args.model)
        engine.warm_guides()
        guided = {"model": args.model, "prompt": "x", "max_tokens": 1, "guided_regex": "[a-z]"}
        await send(port, post("/v1/completions", json.dumps(guided).encode()))
        cases = [(name, state, how) for name in CALLS for state in STATES for how in ("FIN", "RST")]
        random.Random(args.seed).shuffle(cases)
        cases.sort(key=lambda case: case[1] == "queued")  # those at last, with all slots taken
        repeats = -(-args.repeats // len(cases))
        kept: list[socket.socket] = []
        number = 0
        for name, state, how in cases:
            if state == "queued" and not kept:
                kept = await fill(server)
                server.fillers = len(kept)
            for _ in range(repeats):
                number += 1
                server.steps.clear()
                try:
                    seconds = await server.leave(name, state, how, number)
                except TimeoutError as error:
                    raise RuntimeError(f"{name}, {state}, {how}: {error}") from None
                taken[state].append(seconds)
                allowed = ALLOWED_SECONDS + max(server.steps, default=0.0)
                if seconds > allowed:
                    wrong.append(f"{name}, {state}, {how}: {seconds:.3f} s, allowed {allowed:.3f} s")
                server.engine.core.verify()
        for sock in kept:
            sock.close()
        server.fillers = 0
        await server.until(lambda: not server.groups())
        await asyncio.wait_for(engine.idle(), 30)
        core = server.engine.core
        core.verify()  # every block
        core.ledger.verify(live=0)
        print(f"{number} requests given up: {core.ledger}")
    finally:
        stop.set()
        await task
    for state in STATES:
        found = sorted(taken[state])
        print(
            f"{state:10} {len(found):5} times, median {1e3 * found[len(found) // 2]:6.1f} ms, "
            f"at most {1e3 * found[-1]:6.1f} ms"
        )
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m aserve.bench.aborts", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    calm_threads()
    return asyncio.run(measure(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
