"""The server that ``aserve.bench.frontend`` measures: everything but the model is the real thing."""

from __future__ import annotations

import argparse
import json
import os
import queue
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import FrameType
from typing import TYPE_CHECKING, Any

from aserve.errors import ConfigError
from aserve.executor.base import ExecutorBase
from aserve.messages.step import CacheCapacity, StepPlan, StepResult

if TYPE_CHECKING:
    from aserve.config.engine import EngineConfig

TEXT = (
    "The river runs east from the hills, past the old mill and the two stone bridges, and it is slow and "
    "brown until the rains come. In March 1874 it rose by eleven feet in one night; the café by the water "
    "was gone before anybody could say “run”, and so were 230 sheep. “It is only water,” said Müller, who "
    "kept the ferry — and he was right: x = (a + b) * 2 isn't a harder sum than that. "
)

SAMPLE_SECONDS = 0.002

CONTEXT = 160
"""Tokens before the one that ``--compute`` computes."""


class InstantExecutor(ExecutorBase):
    """Answers every plan from a fixed text, ``step_seconds`` after it was submitted."""

    step_seconds = 0.0
    tokens: Sequence[int] = ()
    compute: Callable[[], object] | None = None
    """What a step does besides, in the executor's thread."""
    computed_seconds = 0.0
    computed_steps = 0
    alone_seconds = 0.0
    """The best mean of ``compute`` before anything was served."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._jobs: queue.SimpleQueue[tuple[StepPlan, Future[StepResult]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="instant-executor", daemon=True)
        self._closed = False
        self._thread.start()

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the executor's thread so far."""
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident or 0))

    def start(self) -> Future[CacheCapacity]:
        future: Future[CacheCapacity] = Future()
        future.set_result(CacheCapacity(1 << 16, 0, self.config.scheduler.max_num_seqs))
        return future

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        self._jobs.put((plan, future))
        return future

    def check_health(self) -> None:
        return None

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._thread.join()

    def compute_once(self) -> None:
        if self.compute is not None:
            started = time.perf_counter()
            self.compute()
            self.computed_seconds += time.perf_counter() - started
            self.computed_steps += 1

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            plan, future = job
            if not future.set_running_or_notify_cancel():
                continue
            if self.step_seconds:
                time.sleep(self.step_seconds)
            self.compute_once()
            starts, tokens, count = plan.starts, self.tokens, len(self.tokens)
            drawn = [tokens[(starts[row] + 7 * slot) % count] for row, slot in plan.samples]
            future.set_result(StepResult(plan.step_id, drawn, [-0.5] * len(drawn)))


class StackSampler:
    """Counts, by CPU time of the process, which part of the front end its main thread is in."""

    PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("scheduler", ("aserve/core/",)),
        ("chat template", ("aserve/tokenizer/chat.py", "/jinja2/", "/transformers/")),
        ("input", ("aserve/tokenizer/quick.py",)),
        ("detokenise", ("aserve/tokenizer/",)),
        ("statistics", ("aserve/engine/stats.py", "aserve/metrics.py")),
        ("request log", ("aserve/log.py", "logging/__init__.py")),
        ("output objects", ("aserve/engine/output.py", "aserve/messages/outputs.py")),
        ("parameters", ("aserve/messages/params.py", "/copy.py", "aserve/server/openai/protocol.py")),
        ("parameters", ("/pydantic/",)),
        ("input", ("aserve/engine/input.py", "aserve/server/openai/prompts.py")),
        ("stream wake-up", ("aserve/engine/stream.py", "aserve/server/openai/generation.py")),
        ("event bytes", ("aserve/server/sse.py", "aserve/server/openai/")),
        ("socket write", ("asyncio/streams.py", "aserve/server/direct.py")),
        ("h11", ("/h11/",)),
        ("hypercorn", ("/hypercorn/", "aserve/server/pipelining.py", "aserve/server/exchange.py")),
        ("sse-starlette, anyio", ("/sse_starlette/", "/starlette/", "/anyio/")),
        ("quart, werkzeug", ("/quart/", "/werkzeug/", "/flask/", "aserve/server/")),
        ("engine loop", ("aserve/engine/",)),
        ("asyncio, uvloop", ("",)),
    )

    def __init__(self) -> None:
        self.parts: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.on = False
        self._known: dict[str, str] = {}

    def start(self) -> None:
        signal.signal(signal.SIGPROF, self._take)
        signal.setitimer(signal.ITIMER_PROF, SAMPLE_SECONDS, SAMPLE_SECONDS)

    def _take(self, _number: int, frame: FrameType | None) -> None:
        if not self.on or frame is None:
            return
        code = frame.f_code
        self.lines[f"{'/'.join(code.co_filename.split('/')[-2:])}:{code.co_name}"] += 1
        self.parts[self._part(frame)] += 1

    def _part(self, frame: FrameType) -> str:
        """The part of the innermost frame that belongs to one; library helpers count for their caller."""
        at: FrameType | None = frame
        while at is not None:
            name = at.f_code.co_filename
            part = self._known.get(name)
            if part is None:
                part = next(part for part, marks in self.PARTS if any(mark in name for mark in marks))
                self._known[name] = part
            if part != self.PARTS[-1][0]:
                return part
            at = at.f_back
        return self.PARTS[-1][0]


def serve(args: argparse.Namespace) -> int:
    """Serves until standard input ends; answers every line on it with a line of figures."""
    import uvloop

    from aserve import log
    from aserve.args import parse_serve_args
    from aserve.engine.async_engine import AsyncLLMEngine
    from aserve.engine.llm_engine import LLMEngine
    from aserve.server.serve import serve as serve_engine
    from aserve.threads import calm_threads

    calm_threads()  # before anything imports torch

    seqs = str(max(args.clients, 8))
    argv = [args.model, "--host", "127.0.0.1", "--port", str(args.port), "--max-num-seqs", seqs]
    engine_args, server_args = parse_serve_args(argv)
    log.setup("info")
    InstantExecutor.step_seconds = args.step_ms / 1000
    sampler = StackSampler() if args.parts else None

    async def main() -> int:
        engine = AsyncLLMEngine(False, False)
        engine.engine = LLMEngine.from_config(
            engine_args.create_engine_config(), log_stats=True, executor_class=InstantExecutor
        )
        executor = engine.engine.executor
        if not isinstance(executor, InstantExecutor):
            raise TypeError("the executor is not the one that was asked for")
        executor.tokens = engine.engine.get_tokenizer().encode(TEXT, add_special_tokens=False)
        if args.compute:
            executor.compute = _decode_step(engine.engine.config, args.clients)
            executor.alone_seconds = min(_alone(executor) for _ in range(3))
            executor.computed_seconds, executor.computed_steps = 0.0, 0
        threading.Thread(target=_answer, args=(executor, sampler), daemon=True).start()
        if sampler is not None:
            sampler.start()
        return await serve_engine(engine, server_args, engine_args)

    return uvloop.run(main())


def _decode_step(config: EngineConfig, rows: int) -> Callable[[], object]:
    """A step's work: the packaged model's next token of ``rows`` sequences, on the engine's threads."""
    import numpy as np
    import torch

    from aserve.worker.worker import Worker

    worker = Worker(config)
    worker.start()
    stack, batch = worker.model.greedy_stack, worker.batch
    if stack is None:
        raise ConfigError("--compute needs a model whose whole step is native, such as smollm2")
    blocks = worker.caches[0][0].shape[0]
    own = CONTEXT // config.cache.block_size + 1
    for row in range(rows):
        batch.block_tables[row, :own] = np.arange(row * own, (row + 1) * own) % blocks
    all_rows, positions = list(range(rows)), [CONTEXT] * rows

    def work() -> None:
        with torch.inference_mode():
            stack.greedy(batch.tokens, batch.host_tables, all_rows, positions, worker.caches)

    return work


def _alone(executor: InstantExecutor, steps: int = 100) -> float:
    """Seconds per step with nothing else going on in this process."""
    executor.computed_seconds, executor.computed_steps = 0.0, 0
    for _ in range(steps):
        executor.compute_once()
    return executor.computed_seconds / steps


def _answer(executor: InstantExecutor, sampler: StackSampler | None) -> None:
    """``on`` and ``off`` switch the sampler; either brings the process's figures as JSON."""
    for line in sys.stdin:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        figures: dict[str, Any] = {
            "user": usage.ru_utime,
            "system": usage.ru_stime,
            "executor": executor.cpu_seconds,
            "computed": executor.computed_seconds,
            "alone": executor.alone_seconds,
            "steps": executor.computed_steps,
            "switches": usage.ru_nvcsw + usage.ru_nivcsw,
        }
        if sampler is not None:
            sampler.on = line.strip() == "on"
            figures["parts"] = dict(sampler.parts)
            figures["lines"] = dict(sampler.lines.most_common(60))
        print(json.dumps(figures), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
