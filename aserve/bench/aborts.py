"""How soon a request is gone once its client is: ``python -m aserve.bench.aborts``.

Serves a model over HTTP in this process, and has clients cut the connection, by FIN and by RST, of every kind
of call in every state a request can be in: queued behind others, computing its prompt, decoding, having its
guide compiled, and being read too slowly, with the server's buffers full. Timed is from the cut to the moment
when neither the engine nor the server knows anything of the request any more. It must be no more than the
longest step and 100 ms, each time; what the loop waited for a core that others had is allowed for. In the end
no KV block may be missing and every request be accounted for. The exit status is 1 if not.

The model is a tiny one with random weights unless ``--model`` names another: its steps are short, so there
are many of them, and many ways in which a cut can fall between two.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from aserve.args import AsyncEngineArgs, ServerArgs
from aserve.bench.hostile import post, send
from aserve.server import pipelining
from aserve.threads import calm_threads

if TYPE_CHECKING:
    from aserve.engine.async_engine import AsyncLLMEngine

ALLOWED_SECONDS = 0.1
SLOTS = 8
LONG = 400
STATES = ("queued", "prompt", "decoding", "compiling", "slow")

SEND_BUFFER = 4096
"""Bytes the system keeps for each of the server's connections: a client that does not read is soon felt."""

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
"""A model with the tokenizer of SmolLM2 whose steps take a millisecond or two."""

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
        asked |= guide(path, f"({number}|[a-z]{{1,50}}){{1,20}}")
    if state == "slow" and not asked.get("stream"):  # an answer that does not fit the buffers
        chat = "messages" in asked
        asked |= {"logprobs": True, "top_logprobs": 5} if chat else {"logprobs": 5}
        asked["max_tokens"] = LONG // 4
    return post(path, json.dumps(asked).encode())


def guide(path: str, pattern: str) -> dict[str, Any]:
    """How a call asks for text of a pattern."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "pattern": pattern}},
        "required": ["a"],
    }
    if path == "/v1/responses":
        return {"text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}}
    if path == "/v1/messages":
        return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    return {"guided_regex": pattern}


def waited_for_core() -> float:
    """Seconds for which the calling thread could have run and had no core, so far; 0 where nobody says."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


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

    async def until(self, what: str, holds: Callable[[], bool], seconds: float = 10.0) -> None:
        """Returns once it ``holds``. Time in which this process is stopped does not count."""
        last, left = time.monotonic(), seconds
        while not holds():
            await asyncio.sleep(0.0005)
            now = time.monotonic()
            left -= min(now - last, 0.5)
            last = now
            if left < 0:
                raise TimeoutError(f"waited {seconds:g} s for {what}\n{self.described()}")

    def described(self) -> str:
        """What is there, for whoever has to find out why."""
        core = self.engine.core
        lines = [
            f"{len(core.groups)} requests, {len(core.running)} running, {len(core.waiting)} waiting, "
            f"{self.held()} connections, "
            f"{len(self.steps)} steps, the longest {max(self.steps, default=0):.3f} s"
        ]
        for connection in pipelining.table:
            transport = connection.transport
            lines.append(
                f"{connection.connection!r}, {connection.stream!r}, {transport!r}, "
                f"{transport.get_write_buffer_size() if transport is not None else 0} bytes unsent"
            )
        for task in asyncio.all_tasks():
            frames = task.get_stack(limit=None)
            lines.append(f"{task.get_name()}: " + " < ".join(
                f"{frame.f_code.co_name}:{frame.f_lineno}" for frame in reversed(frames)))  # fmt: skip
        return "\n".join(lines)

    async def leave(self, name: str, state: str, how: str, number: int) -> tuple[float, float]:
        """Seconds from a client's leaving until nothing is left of its request, and those allowed."""
        guides = self.engine.input.guides
        if state == "compiling":  # of which there is one at a time
            await self.until("earlier guides", lambda: not guides._running, 60)
        before = self.groups()
        self.steps.clear()
        sock = socket.socket()
        sock.setblocking(False)
        if state == "slow":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", self.port))
        await loop.sock_sendall(sock, call(name, state, number, self.model))
        if state == "compiling":
            await self.until("a guide", lambda: bool(guides._running))
        else:
            await self.until("a request", lambda: self.groups() > before)
            mine = [self.engine.core.groups[each] for each in self.groups() - before]
            if state == "decoding":
                await self.until("a token", lambda: any(each.first_token_time is not None for each in mine))
                await asyncio.sleep(0.02)
            elif state == "prompt":
                await self.until(
                    "a step", lambda: any(each.first_scheduled_time is not None for each in mine)
                )
            elif state == "slow":
                await self.until("a full buffer", self.stuck, 30)
        if how == "RST":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        left, kept = time.perf_counter(), waited_for_core()
        await self.until("the end", lambda: self.groups() <= before and not self.held())
        seconds = time.perf_counter() - left
        return seconds, ALLOWED_SECONDS + max(self.steps, default=0.0) + waited_for_core() - kept

    def held(self) -> int:
        """Connections that the server still has, but for the fillers'."""
        return len(pipelining.table) - self.fillers

    def stuck(self) -> bool:
        """Whether a client does not read what it is sent."""
        transports = [connection.transport for connection in pipelining.table]
        return any(each is not None and each.get_write_buffer_size() for each in transports)


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
    await server.until("every slot", lambda: len(server.groups()) == SLOTS)
    return kept


async def measure(args: argparse.Namespace) -> int:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    from aserve.engine.async_engine import AsyncLLMEngine
    from aserve.server.app import create_app
    from aserve.server.serve import listen

    pipelining.install()
    chosen: dict[str, Any] = {"model": args.model}
    if args.model is None:
        folder = Path(tempfile.mkdtemp(prefix="aserve-tiny-"))
        (folder / "config.json").write_text(json.dumps(TINY))
        chosen = {"model": str(folder), "tokenizer": "smollm2", "load_format": "dummy"}
    engine = AsyncLLMEngine.from_engine_args(
        AsyncEngineArgs(
            **chosen,
            max_num_seqs=SLOTS,
            disable_log_requests=True,
            num_gpu_blocks_override=1200,
            enable_chunked_prefill=True,  # a prompt must take several steps
            max_num_batched_tokens=128,
        )
    )
    name_served = engine.model_config.served_model_name[0]
    settings = ServerArgs()
    settings.check()
    app = create_app(None, settings, engine)
    listener = listen("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # accepted sockets inherit it
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
        server = Server(engine, port, name_served)
        engine.warm_guides()
        guided = {"model": name_served, "prompt": "x", "max_tokens": 1, "guided_regex": "[a-z]"}
        await send(port, post("/v1/completions", json.dumps(guided).encode()))
        cases = [(name, state, how) for name in CALLS for state in STATES for how in ("FIN", "RST")]
        cases = [case for case in cases if args.only in ", ".join(case)]
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
                try:
                    seconds, allowed = await server.leave(name, state, how, number)
                except TimeoutError as error:
                    raise RuntimeError(f"{name}, {state}, {how}: {error}") from None
                taken[state].append(seconds)
                if seconds > allowed:
                    wrong.append(f"{name}, {state}, {how}: {seconds:.3f} s, allowed {allowed:.3f} s")
                server.engine.core.verify()
        for sock in kept:
            sock.close()
        server.fillers = 0
        await server.until("the streams that held the slots", lambda: not server.groups())
        await asyncio.wait_for(engine.idle(), 30)
        core = server.engine.core
        core.verify()  # every block
        core.ledger.verify(live=0)
        print(f"{number} requests given up: {core.ledger}")
    finally:
        stop.set()
        await task
    for state in (state for state in STATES if state in taken):
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
    parser.add_argument("--model", help="instead of the tiny one")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases such as 'n=4, slow, RST' that have it"
    )
    calm_threads()
    return uvloop.run(measure(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
