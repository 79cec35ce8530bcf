"""aserve itself, offline. Argument: the keywords of ``LLM`` as a JSON object."""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from typing import Any

import torch

import aserve
from aserve import LLM, SamplingParams, ops
from aserve.bench import limits, weights
from aserve.bench.runners import wire


class Bench:
    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.vocab_size = llm.llm_engine.get_model_config().vocab_size
        self.threads = torch.get_num_threads()

    def run(self, n: int, input_len: int, output_len: int) -> dict[str, Any]:
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        prompts = [wire.prompt_ids(i, input_len, self.vocab_size) for i in range(n)]
        started = time.perf_counter()
        outputs = self.llm.generate(None, params, prompts, use_tqdm=False)
        seconds = time.perf_counter() - started
        result: dict[str, Any] = {
            "seconds": seconds,
            "output_tokens": sum(len(each.outputs[0].token_ids) for each in outputs),
        }
        if n == 1 and output_len > 1:
            metrics = outputs[0].metrics
            result["prefill_seconds"] = metrics.first_token_time - metrics.arrival_time
            result["decode_seconds"] = (metrics.last_token_time - metrics.first_token_time) / (output_len - 1)
        return result

    def steps(self, n: int, input_len: int, output_len: int, cold: bool = False) -> dict[str, Any]:
        """Median seconds of a decode step inside the worker, the engine around it left out.

        cold: before every step a buffer larger than the caches is walked; plans then hold one step each.
        """
        engine: Any = self.llm.llm_engine
        max_steps = engine._max_steps
        worker: Any = weights.worker_of(self.llm)
        launch = worker.launch
        seconds: list[float] = []
        sweep = torch.ones(512 << 20, dtype=torch.uint8) if cold else None

        def timed(plan: Any) -> Any:
            if sweep is not None:
                limits.read_rate([sweep], self.threads, repeats=1)
            started = time.perf_counter()
            handle = launch(plan)
            if len(plan.slots) == n and plan.num_prefill_rows == 0:
                seconds.append((time.perf_counter() - started) / handle.wait().steps)
            return handle

        if cold:
            engine._max_steps = 1
        worker.launch = timed
        try:
            self.run(n, input_len, output_len)
        finally:
            del worker.launch
            engine._max_steps = max_steps
        return {"step_seconds": statistics.median(seconds), "best_seconds": min(seconds)}

    def weights(self) -> dict[str, Any]:
        """The bytes of weights a decode step reads, and how fast a plain read of them is, here and now."""
        tensors = weights.read_by_a_step(self.llm)
        return {
            "bytes": sum(size for _, size in limits.memory_of(tensors)),
            "read_rate": limits.read_rate(tensors, self.threads),
            "cold_read_rate": limits.read_rate(tensors, self.threads, cold=True),
        }

    def work(self) -> dict[str, Any]:
        return weights.multiplications(self.llm.llm_engine.get_model_config().hf_config)

    def idle(self) -> dict[str, Any]:
        """CPU seconds this process burns in a second of waiting: what it costs the others."""
        before = time.process_time()
        time.sleep(1.0)
        return {"cpu_seconds": time.process_time() - before, "threads": threading.active_count()}


def start() -> tuple[dict[str, Any], dict[str, wire.Handler]]:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    bench = Bench(LLM(**options))
    facts = {"system": f"aserve {aserve.__version__}", "kernels": ops.kernels()}
    handlers = {name: getattr(bench, name) for name in ("run", "steps", "weights", "work", "idle")}
    return facts, handlers


if __name__ == "__main__":
    wire.serve(start)
