"""What the offline benchmarks share: an engine from flags, and the fixed work."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aserve.args import EngineArgs
from aserve.bench import datasets
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from aserve.llm import LLM
    from aserve.messages.outputs import RequestOutput


def parse(prog: str, description: str | None, own: dict[str, tuple[int, str]], argv: list[str]) -> Any:
    """Options of a command that takes the engine's flags besides its ``own`` counts (default, help)."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    group = parser.add_argument_group("Benchmark")
    for name, (default, text) in own.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=int, default=default, help=f"{text} (default: {default})")
    group.add_argument("--output-json", metavar="FILE", help="Write the result here too.")
    EngineArgs.add_cli_args(parser)
    options = parser.parse_args(argv)
    for name in own:
        least = 0 if name.endswith("warmup") else 1
        if getattr(options, name) < least:
            raise ConfigError(f"{name} must be at least {least}, got {getattr(options, name)}", param=name)
    return options


def open_llm(options: argparse.Namespace) -> LLM:
    """The engine that the flags describe."""
    engine_args = EngineArgs.from_cli_args(options)
    from aserve.llm import LLM  # imports torch: not before the arguments are known to parse

    values = {field.name: getattr(engine_args, field.name) for field in dataclasses.fields(engine_args)}
    return LLM(**values)


def check_fits(llm: LLM, input_len: int, output_len: int) -> None:
    limit = llm.llm_engine.get_model_config().max_model_len
    if input_len + output_len > limit:
        raise ConfigError(f"{input_len} + {output_len} tokens exceed the model's {limit}", param="input_len")


def generate(
    llm: LLM,
    count: int,
    input_len: int,
    output_len: int,
    *,
    n: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> tuple[float, list[RequestOutput]]:
    """Completes ``count`` prompts of random ids to exactly ``output_len`` tokens; seconds and outputs.

    Greedy for n = 1; more sequences of one prompt are drawn at temperature 1.
    """
    from aserve.messages.params import SamplingParams

    vocab = llm.llm_engine.get_model_config().vocab_size
    token_range = datasets.fit_range(datasets.TOKEN_RANGE, vocab)
    requests = datasets.random_requests(count, input_len, output_len, 0.0, seed, token_range)
    params = SamplingParams(
        n=n, temperature=0.0 if n == 1 else 1.0, max_tokens=output_len, ignore_eos=True, detokenize=True
    )
    prompts: list[list[int]] = [list(request.prompt) for request in requests]  # type: ignore[arg-type]
    started = time.perf_counter()
    outputs = llm.generate(None, params, prompts, use_tqdm=progress)
    return time.perf_counter() - started, outputs


def save(path: str | None, result: dict[str, Any]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def count_tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(each.token_ids) for output in outputs for each in output.outputs)
