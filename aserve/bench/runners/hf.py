"""transformers' generate in bfloat16, static batches. Arguments: CHECKPOINT_FOLDER THREADS.

Where the folder has a configuration and no weights, they are made up.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from aserve.bench.runners import wire


class _Clock(BaseStreamer):
    """Notes when tokens come: first the prompt, then each drawn token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def start() -> tuple[dict[str, Any], dict[str, wire.Handler]]:
    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    if not list(Path(folder).glob("*.safetensors")):
        config = AutoConfig.from_pretrained(folder)
        make: Any = AutoModelForCausalLM.from_config
        with torch.device("meta"):
            model = make(config, dtype=torch.bfloat16)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.uniform_(-0.02, 0.02)
        model.tie_weights()
        for module in model.modules():  # buffers that "meta" has no values for
            if hasattr(module, "rope_init_fn"):
                module.__init__(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.eval()
    vocab_size = model.config.vocab_size

    @torch.inference_mode()
    def run(n: int, input_len: int, output_len: int) -> dict[str, Any]:
        ids = torch.tensor([wire.prompt_ids(i, input_len, vocab_size) for i in range(n)])
        clock = _Clock() if n == 1 else None
        started = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        ended = time.perf_counter()
        result: dict[str, Any] = {
            "seconds": ended - started,
            "output_tokens": int(out.numel() - ids.numel()),
        }
        if clock is not None and output_len > 1:
            result["prefill_seconds"] = clock.times[1] - started
            result["decode_seconds"] = (clock.times[-1] - clock.times[1]) / (output_len - 1)
        return result

    return {"system": f"transformers {transformers.__version__}, torch {torch.__version__}"}, {"run": run}


if __name__ == "__main__":
    wire.serve(start)
