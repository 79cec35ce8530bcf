"""The engine on this device: what it generates, and how fast.

The engine is imported where a unit runs: without its dependencies the other phases still run.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from aserve.gpu_check.children import Unit
from aserve.gpu_check.machine import Machine
from aserve.gpu_check.options import Options
from aserve.gpu_check.phases import ceilings
from aserve.gpu_check.results import Row
from aserve.ops import cuda

BATCHES = (1, 32, 256)
PROMPT, SHORT, LONG = 128, 8, 72
PREFILL, CHUNK = 8192, 2048
GOAL_SHARE = 0.85
"""Of the copy rate, for the decode of one sequence by the 8 B shape."""
TIE = {"float32": 1e-3, "bfloat16": 0.2}
"""Log-probabilities closer than this may change places by rounding."""


def units(options: Options) -> list[Unit]:
    shapes = ("dry",) if options.dry else ("llama-8b", "llama-1b")
    return [
        *(_agreement(dtype, options) for dtype in TIE),
        *(_speed(name, eager, options) for name in shapes for eager in (False, True)),
        _served("dry" if options.dry else "llama-1b", options),
    ]


def _prepare(machine: Machine) -> None:
    """This process' engine, and its children's, take the kernels that are being checked."""
    os.environ[cuda.VARIABLE] = "all"
    if machine.dry:
        torch.set_num_threads(1)


def _unit(name: str, options: Options, seconds: float, run: Any) -> Unit:
    def inside(machine: Machine) -> Iterator[Row]:
        _prepare(machine)
        with tempfile.TemporaryDirectory() as folder:
            yield from run(machine, Path(folder))

    return Unit(name, {"kind": "end_to_end", "name": name}, seconds, inside, alone=not options.dry)


def _open(machine: Machine, model: Path, eager: bool, **more: Any) -> Any:
    from aserve.llm import LLM

    return LLM(
        str(model),
        device=machine.device,
        enforce_eager=eager,
        skip_tokenizer_init=True,
        enable_chunked_prefill=True,
        swap_space=0,
        **more,
    )


def _agreement(dtype: str, options: Options) -> Unit:
    count, length, new = (3, 24, 12) if options.dry else (16, 96, 96)

    def run(machine: Machine, folder: Path) -> Iterator[Row]:
        from aserve.gpu_check import models

        model = models.write_small(folder / "small", dtype, options.seed % 1000)
        random = torch.Generator().manual_seed(options.seed)
        prompts = [torch.randint(3, 1024, (length + at,), generator=random).tolist() for at in range(count)]
        outputs = {}
        for mode, eager in (("graph", False), ("eager", True)):
            outputs[mode], facts = _greedy(machine, model, eager, dtype, prompts, new)
            yield _engine(facts, eager, machine)
        oracle = _Oracle(model, machine.device, dtype)
        outputs["transformers"] = [oracle.greedy(prompt, new) for prompt in prompts]
        for one, other in (("graph", "eager"), ("graph", "transformers"), ("eager", "transformers")):
            same = ties = 0
            for prompt, a, b in zip(prompts, outputs[one], outputs[other], strict=True):
                same += a == b
                ties += a != b and oracle.tied(prompt, a, b, TIE[dtype])
            yield {
                "what": f"greedy tokens, {one} and {other}",
                "passed": same + ties == count,
                "equal": same,
                "ties": ties,
                "prompts": count,
            }

    return _unit(f"agreement in {dtype}", options, 100, run)


def _greedy(
    machine: Machine, model: Path, eager: bool, dtype: str, prompts: list[list[int]], new: int
) -> tuple[list[list[int]], dict[str, str]]:
    """The prompts' tokens, and what the engine says it runs on."""
    from aserve.messages.params import SamplingParams

    memory = {"num_gpu_blocks_override": 512} if machine.dry else {"gpu_memory_utilization": 0.2}
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    with _open(machine, model, eager, dtype=dtype, max_model_len=512, max_num_seqs=16, **memory) as llm:
        outputs = llm.generate(None, params, prompts, use_tqdm=False)
        facts = dict(llm.llm_engine.capacity.description)
    return [list(output.outputs[0].token_ids) for output in outputs], facts


def _engine(facts: dict[str, str], eager: bool, machine: Machine) -> Row:
    """That steps are replayed from graphs where they should be, and by which kernels; a CPU has no graphs."""
    row: Row = {"engine": facts}
    if not machine.dry:
        row["passed"] = (facts["graphs"] == "none") == eager
    return row


class _Oracle:
    """The same checkpoint in transformers."""

    def __init__(self, model: Path, device: str, dtype: str) -> None:
        from transformers import LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._device = device
        loaded: Any = LlamaForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model = loaded.to(device).eval()

    @torch.inference_mode()
    def greedy(self, prompt: list[int], new: int) -> list[int]:
        cache, ids, found = None, torch.tensor([prompt], device=self._device), []
        for _ in range(new):
            out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = out.past_key_values, out.logits[:, -1].float().argmax(-1, keepdim=True)
            found.append(int(ids))
        return found

    @torch.inference_mode()
    def tied(self, prompt: list[int], a: list[int], b: list[int], margin: float) -> bool:
        """Whether the first tokens in which the two differ are as good as equally likely."""
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if at is None:
            return False
        ids = torch.tensor([prompt + a[:at]], device=self._device)
        logprobs = self._model(ids).logits[0, -1].double().log_softmax(-1)
        return abs(float(logprobs[a[at]] - logprobs[b[at]])) < margin


def _speed(name: str, eager: bool, options: Options) -> Unit:
    batches = (1, 4) if options.dry else BATCHES
    mode = "eager" if eager else "graphs"

    def run(machine: Machine, folder: Path) -> Iterator[Row]:
        from aserve.bench import offline
        from aserve.gpu_check import models

        models.register()
        shape = models.SHAPES[name]
        model = models.write_shape(folder / name, name)
        prompt, chunk, whole = (16, 32, 128) if machine.dry else (PROMPT, CHUNK, PREFILL)
        limit = whole + 64
        memory = {"num_gpu_blocks_override": 512} if machine.dry else {}
        with _open(
            machine,
            model,
            eager,
            load_format=models.ON_DEVICE,
            max_model_len=limit,
            max_num_seqs=max(batches),
            max_num_batched_tokens=chunk,
            **memory,
        ) as llm:
            yield _engine(dict(llm.llm_engine.capacity.description), eager, machine)
            offline.generate(llm, 1, prompt, 2)  # first use of every kernel
            for batch in batches:
                offline.generate(llm, batch, prompt, 2)
                short, _ = offline.generate(llm, batch, prompt, SHORT)
                long, _ = offline.generate(llm, batch, prompt, LONG)
                step = (long - short) / (LONG - SHORT)
                row = _decoded(shape, mode, batch, prompt, step, options)
                if (name, batch, eager) == ("llama-8b", 1, False) and row.get("share_of_ceiling"):
                    row["goal_met"] = row["share_of_ceiling"] >= GOAL_SHARE
                yield row
            taken, _ = offline.generate(llm, 1, whole, 1)
            _, matrices = models.parameters(shape)
            yield {
                "what": f"prefill in chunks of {chunk}, {mode}",
                "tokens_per_second": round(whole / taken, 1),
                "flops_of_matrices": 2 * matrices * whole / taken,
            }

    return _unit(f"{name}, {mode}", options, 100, run)


def _decoded(shape: dict[str, Any], mode: str, batch: int, prompt: int, step: float, options: Options) -> Row:
    """A decode step's time beside what its bytes take at the measured copy rate."""
    from aserve.gpu_check import models

    row: Row = {"what": f"decode, batch {batch}, {mode}", "batch": batch, "step_ms": round(step * 1e3, 3)}
    if step <= 0:
        return {**row, "error": "the clock does not resolve a step"}
    weights, _ = models.parameters(shape)
    moved = 2 * weights + batch * (prompt + (SHORT + LONG) // 2) * models.kv_bytes(shape)
    copy = options.ceilings.get(ceilings.COPY)
    return {
        **row,
        "tokens_per_second": round(batch / step, 1),
        "bytes": moved,
        "share_of_ceiling": None if copy is None else round(moved / copy / step, 4),
    }


def _served(name: str, options: Options) -> Unit:
    clients, prompt, new = (2, 16, 8) if options.dry else (32, 512, 128)

    def run(machine: Machine, folder: Path) -> Iterator[Row]:
        from aserve.bench import load
        from aserve.gpu_check import models

        model = models.write_shape(folder / name, name)
        flags = [
            "--device",
            machine.device,
            "--load-format",
            "dummy",
            "--max-model-len",
            str(prompt + new + 64),
        ]
        flags += ["--num-gpu-blocks-override", "512"] if machine.dry else []
        command = [sys.executable, "-m", "aserve", "serve", str(model), *flags]
        with load.Server(command, folder / "server.log", os.environ) as server:
            load.run(server.url, 1, prompt, new)
            for count in (1, clients):
                found = load.run(server.url, count, prompt, new)
                rate = found["output_tokens"] / found["seconds"]
                yield {
                    "what": f"served over HTTP, {count} clients, {prompt} tokens in, {new} out",
                    "passed": found["output_tokens"] == count * new,
                    "ttft_ms": round(found["ttft_ms"], 2),
                    "tpot_ms": round(found["tpot_ms"], 3),
                    "tokens_per_second": round(rate, 1),
                }

    return _unit(f"{name}, served", options, 120, run)
