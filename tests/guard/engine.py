"""The Python of a step, with no model behind it, for callgrind: ``python -m tests.guard.engine LIBRARY``.

Sixteen sequences of a tiny checkpoint run together through scheduler, output processing and
detokenisation; an executor in the same thread answers at once. LIBRARY holds ``guard_start`` and
``guard_dump`` (see ``requests.c``), which bracket what is counted: first 16 x 8 tokens, then 16 x 40, so
that their difference is 512 further tokens and the rest is requests coming and going.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from aserve.args import EngineArgs
from aserve.engine.llm_engine import LLMEngine
from aserve.executor.base import ExecutorBase
from aserve.messages.inputs import OutputKind
from aserve.messages.params import SamplingParams
from aserve.messages.step import CacheCapacity, StepPlan, StepResult
from tests import tiny_checkpoint

REQUESTS, PROMPT = 16, 32
SHORT, LONG = 8, 40


class InstantExecutor(ExecutorBase):
    """Draws the byte "a", at once."""

    def start(self) -> Future[CacheCapacity]:
        return _done(CacheCapacity(256, 0, REQUESTS))

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        count = len(plan.samples)
        return _done(StepResult(plan.step_id, [68] * count, [-1.0] * count))

    def check_health(self) -> None:
        """It cannot fail."""

    def close(self) -> None:
        """It holds nothing."""


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def build(folder: Path) -> LLMEngine:
    checkpoint = tiny_checkpoint.write(folder)
    args = EngineArgs(model=str(checkpoint), load_format="dummy", max_num_seqs=REQUESTS)
    executor: Any = InstantExecutor
    return LLMEngine.from_config(args.create_engine_config(), log_stats=True, executor_class=executor)


def work(engine: LLMEngine, name: str, tokens: int) -> int:
    """Runs the requests to their end; returns how many tokens came out of the sinks."""
    produced = 0

    def sink(output: Any) -> None:
        nonlocal produced
        produced += sum(len(each.token_ids) for each in output.outputs)

    for index in range(REQUESTS):
        params = engine.input.check_params(
            SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        )
        ids = [40 + (index + place) % 50 for place in range(PROMPT)]
        group = engine.input.make_group(f"{name}-{index}", None, ids, params, 0.0, None, None)
        engine.queue(group, OutputKind.DELTA, sink)
    while engine.has_unfinished_requests():
        plan = engine.schedule()
        if plan is None:
            raise RuntimeError("nothing to do, yet requests are unfinished")
        engine.commit(plan, engine.executor.submit(plan).result())
    return produced


def main() -> None:
    counter = ctypes.CDLL(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        engine = build(Path(folder))
        work(engine, "first", LONG)
        gc.collect()
        gc.disable()
        for name, tokens in (("short", SHORT), ("long", LONG)):
            counter.guard_start()
            produced = work(engine, name, tokens)
            counter.guard_dump(name.encode())
            if produced != REQUESTS * tokens:
                raise RuntimeError(f"{produced} tokens came out, not {REQUESTS * tokens}")
        engine.close()


if __name__ == "__main__":
    main()
