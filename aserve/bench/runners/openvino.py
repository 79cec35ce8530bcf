"""OpenVINO GenAI, continuous batching over a GGUF file. Arguments: FILE THREADS."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai

from aserve.bench.runners import wire


def start() -> tuple[dict[str, Any], dict[str, wire.Handler]]:
    file, threads = sys.argv[1], int(sys.argv[2])
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_batched_tokens = 2048
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        file,
        scheduler_config=scheduler,
        device="CPU",
        properties={"INFERENCE_NUM_THREADS": threads},
    )
    vocab_size = 40000
    next_id = iter(range(1 << 30))

    def run(n: int, input_len: int, output_len: int) -> dict[str, Any]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_len
        config.ignore_eos = True
        prompts = [
            openvino.Tensor(np.array([wire.prompt_ids(i, input_len, vocab_size)], dtype=np.int64))
            for i in range(n)
        ]
        started = time.perf_counter()
        handles = [pipeline.add_request(next(next_id), prompt, config) for prompt in prompts]
        first = None
        while pipeline.has_non_finished_requests():
            pipeline.step()
            first = first or time.perf_counter()
        ended = time.perf_counter()
        produced = sum(len(each.generated_ids) for handle in handles for each in handle.read_all())
        result: dict[str, Any] = {"seconds": ended - started, "output_tokens": produced}
        if n == 1 and first is not None and output_len > 1:
            result["decode_seconds"] = (ended - first) / (output_len - 1)
            result["prefill_seconds"] = first - started
        return result

    return {"system": f"OpenVINO GenAI {openvino_genai.__version__}"}, {"run": run}


if __name__ == "__main__":
    wire.serve(start)
