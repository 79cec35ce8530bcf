"""Writes what transformers generates greedily, in float32, from the packaged models.

Run as ``python -m tests.parity.make_golden``. For every prompt: its ids, the next 64 greedy tokens and,
at every position, the five likeliest tokens with their log-probabilities.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from aserve.packaged import resolve
from tests.parity.prompts import NUM_TOKENS, PROMPTS

FOLDER = Path(__file__).parent
MODELS = ("smollm2", "gemma3-270m")


def golden_path(name: str) -> Path:
    return FOLDER / f"golden_{name}.json"


def load_oracle(name: str) -> tuple[Any, Any]:
    path = Path(str(resolve(name)))
    options = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options).eval()
    return model, AutoTokenizer.from_pretrained(path.parent, **options)


@torch.inference_mode()
def greedy(model: Any, ids: list[int], num_tokens: int = NUM_TOKENS) -> dict[str, Any]:
    cache = DynamicCache(config=model.config)
    step = torch.tensor([ids])
    tokens: list[int] = []
    top: list[list[tuple[int, float]]] = []
    margin = float("inf")
    for _ in range(num_tokens):
        logits = model(step, past_key_values=cache, use_cache=True).logits[0, -1].float()
        values, indices = torch.log_softmax(logits, -1).topk(5)
        top.append([(int(i), round(float(v), 5)) for i, v in zip(indices, values, strict=True)])
        margin = min(margin, float(values[0] - values[1]))
        tokens.append(int(indices[0]))
        step = indices[:1].unsqueeze(0)
    return {"ids": ids, "tokens": tokens, "top": top, "margin": margin}


def main() -> None:
    for name in sys.argv[1:] or MODELS:
        model, tokenizer = load_oracle(name)
        entries = [greedy(model, tokenizer.encode(prompt)) for prompt in PROMPTS]
        golden_path(name).write_text(json.dumps(entries, separators=(",", ":")) + "\n")
        print(name, "smallest margin between the two likeliest tokens:", min(e["margin"] for e in entries))


if __name__ == "__main__":
    main()
