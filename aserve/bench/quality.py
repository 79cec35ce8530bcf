"""How far packed weights move next-token distributions: ``python -m aserve.bench.quality``.

At every position of the documents in ``texts``, the distribution after the packed weights (int8
activations) is compared with that of transformers in float32 on the same file dequantised, by the
Kullback-Leibler divergence ``sum p log(p / q)`` in nats, p being transformers', and by whether the likeliest
token is the same. llama.cpp is held to the same, and the gate is the ratio of the mean divergences.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aserve import packaged
from aserve.args import EngineArgs
from aserve.errors import ConfigError
from aserve.messages.params import SamplingParams
from aserve.messages.step import NewSequence, StepPlan

TEXTS = Path(__file__).parent / "texts"
GATE = 1.2
"""Most that the mean divergence may be of llama.cpp's."""


@dataclass(frozen=True)
class Divergence:
    """Over ``positions``: mean and greatest divergence (nats), share of equal top tokens."""

    positions: int
    mean: float
    max: float
    top1: float


def documents(tokenizer: Any, limit: int | None = None) -> list[list[int]]:
    """Token ids of each text, in order of file name; at most ``limit`` tokens in all."""
    found: list[list[int]] = []
    left = limit if limit is not None else sys.maxsize
    for path in sorted(TEXTS.iterdir()):
        ids = list(tokenizer.encode(path.read_text(encoding="utf-8")))[:left]
        left -= len(ids)
        if ids:
            found.append(ids)
    return found


def divergence(reference: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> Divergence:
    """Both: logits ``[tokens, vocab]`` of each document."""
    means, tops = [], []
    for expected, actual in zip(reference, other, strict=True):
        if expected.shape != actual.shape:
            raise ValueError(f"logits of shapes {tuple(expected.shape)} and {tuple(actual.shape)}")
        for start in range(0, len(expected), 64):  # float64 takes memory
            p_logits, q_logits = expected[start : start + 64], actual[start : start + 64]
            p = torch.log_softmax(p_logits.double(), -1)
            q = torch.log_softmax(q_logits.double(), -1)
            means.append((p.exp() * (p - q)).sum(-1))
            tops.append(p_logits.argmax(-1) == q_logits.argmax(-1))
    all_means, all_tops = torch.cat(means), torch.cat(tops)
    return Divergence(
        len(all_means), float(all_means.mean()), float(all_means.max()), float(all_tops.double().mean())
    )


@torch.inference_mode()
def reference_logits(gguf: str, ids: Sequence[list[int]]) -> list[torch.Tensor]:
    """transformers in float32 on the dequantised file."""
    from transformers import AutoModelForCausalLM

    path = Path(gguf)
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()
    return [model(torch.tensor([each])).logits[0].float() for each in ids]


class Logits:
    """The logits of a worker's model at every position, computed the way a step does.

    settings: engine arguments besides the model.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        from aserve.worker.worker import Worker

        settings = {"max_model_len": 1024, "max_num_seqs": 2} | settings
        config = EngineArgs(model=model, **settings).create_engine_config()
        self._block_size = config.cache.block_size
        self._worker = Worker(config)
        self._worker.start()
        self._steps = 0

    @torch.inference_mode()
    def of(self, ids: list[int], chunk: int | None = None) -> torch.Tensor:
        """float32 ``[tokens, vocab]``; the tokens are computed ``chunk`` at a time (None: all at once)."""
        worker = self._worker
        blocks = list(range(-(-len(ids) // self._block_size)))
        new = NewSequence(
            slot=0,
            seq_id=0,
            token_ids=ids,
            num_prompt_tokens=len(ids),
            block_ids=blocks,
            params=SamplingParams(),
            rng_seed=0,
        )
        rows = []
        for start in range(0, len(ids), chunk or len(ids)):
            count = min(chunk or len(ids), len(ids) - start)
            plan = StepPlan(self._steps, [0], [start], [count], [], new=[] if start else [new])
            self._steps += 1
            worker.batch.apply(plan)
            inputs = worker.batch.inputs(plan)
            hidden = worker.model.forward(inputs.token_ids, inputs.positions, worker.caches, inputs.attention)
            rows.append(worker.model.compute_logits(hidden).float().clone())
        return torch.cat(rows)


def llama_cpp_logits(
    python: str, gguf: str, ids: Sequence[list[int]], threads: int, folder: Path
) -> Iterator[torch.Tensor]:
    """llama.cpp's in the peers' environment, one document at a time."""
    (folder / "ids.json").write_text(json.dumps(list(ids)))
    command = [python, "-m", "aserve.bench.runners.llamacpp", gguf, str(threads), str(folder)]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode != 0:
        raise ConfigError(f"llama.cpp cannot be run with {python}: {done.stderr[-1000:]}")
    for number in range(len(ids)):
        yield torch.from_numpy(np.load(folder / f"{number}.npy"))


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="smollm2", help="a packaged model or a GGUF file")
    parser.add_argument("--dtype", default="auto", help="aserve's --dtype (default: auto)")
    parser.add_argument("--quantization", help="aserve's --quantization (default: what the file asks for)")
    parser.add_argument("--limit", type=int, help="tokens at most (default: all)")
    parser.add_argument("--peers", help="Python of the environment that has llama.cpp")
    parser.add_argument("--threads", type=int, default=2, help="(default: 2)")
    parser.add_argument("--output-json", type=Path, metavar="FILE", default=Path("build/bench/quality.json"))
    options = parser.parse_args()
    from aserve.tokenizer.loader import load_tokenizer

    torch.set_num_threads(options.threads)
    gguf = packaged.resolve(options.model) or options.model
    ids = documents(load_tokenizer(gguf), options.limit)
    reference = reference_logits(gguf, ids)
    own = Logits(gguf, dtype=options.dtype, quantization=options.quantization)
    found = {"aserve": divergence(reference, (own.of(each) for each in ids))}
    sample = ids[-1][:48]
    whole = own.of(sample)
    same = {chunk: bool(torch.equal(whole, own.of(sample, chunk))) for chunk in (1, 5, 17)}
    with tempfile.TemporaryDirectory() as folder:
        if options.peers and Path(options.peers).exists():
            logits = llama_cpp_logits(options.peers, gguf, ids, options.threads, Path(folder))
            found["llama.cpp"] = divergence(reference, logits)
    print(f"{options.model}: {found['aserve'].positions} positions of {len(ids)} texts, against float32")
    print(f"{'':<12}{'mean KL':>12}{'max KL':>12}{'top-1':>10}")
    for name, each in found.items():
        print(f"{name:<12}{each.mean:>12.3e}{each.max:>12.3e}{each.top1:>10.2%}")
    passed = all(same.values())
    print(
        "pieces of " + ", ".join(f"{chunk}: {'equal' if ok else 'NOT equal'}" for chunk, ok in same.items())
    )
    result: dict[str, Any] = {name: asdict(each) for name, each in found.items()}
    result["equal_in_pieces"] = same
    if "llama.cpp" in found:
        ratio = found["aserve"].mean / found["llama.cpp"].mean
        passed = passed and ratio <= GATE
        result["ratio"] = ratio
        print(f"mean KL is {ratio:.2f} times llama.cpp's (at most {GATE})")
    result["passed"] = passed
    options.output_json.parent.mkdir(parents=True, exist_ok=True)
    options.output_json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
