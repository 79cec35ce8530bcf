"""The model of a device against the engine itself, on the machine at hand.

::

    python -m aserve.simulate.measure steps --output-json steps.json --model smollm2
    python -m aserve.simulate.measure replay --steps steps.json --request-rate 2 --model smollm2

``steps`` times the engine's steps for batches and contexts of several sizes; ``aserve simulate --calibrate``
fits a device to the file. ``replay`` puts one trace through the engine in real time and through the
simulator with the device so fitted, one step at a time in both, and prints the figures side by side. Both
take the engine's flags. Times mean something on an idle machine only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aserve import registry
from aserve.args import EngineArgs
from aserve.config.model import ModelConfig
from aserve.errors import ConfigError
from aserve.messages.params import SamplingParams
from aserve.messages.step import StepPlan, StepResult
from aserve.simulate import calibrate, report
from aserve.simulate.device import PRESETS, ModelShape, Profile, as_json
from aserve.simulate.policy import Serving
from aserve.simulate.trace import Lengths, Request, TraceSpec
from aserve.simulate.virtual import FINISHED, TOO_LONG, Outcome, Run, Simulation

if TYPE_CHECKING:
    from aserve.engine.llm_engine import LLMEngine

BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (16, 128, 512, 1536)
DECODES = 8

Note = Callable[[StepPlan, float], None]


def main(argv: list[str]) -> int:
    """Exit status 2 for settings that cannot work."""
    options = parser().parse_args(argv)
    try:
        if options.command == "steps":
            steps(options)
        else:
            replay(options)
    except ConfigError as error:
        print(f"aserve.simulate.measure: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m aserve.simulate.measure", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    timed = commands.add_parser("steps", allow_abbrev=False, help="time steps")
    timed.add_argument("--output-json", metavar="FILE", required=True, help="Where the steps go.")
    timed.add_argument("--batches", default=",".join(map(str, BATCHES)), help="Sequences at a time.")
    timed.add_argument("--contexts", default=",".join(map(str, CONTEXTS)), help="Prompt tokens of each.")
    timed.add_argument("--repeats", type=int, default=3, help="Rounds of each size. (default: 3)")
    timed.add_argument(
        "--best",
        action="store_true",
        help="Take the quickest of equal steps, not the median: for a busy machine.",
    )
    timed.add_argument(
        "--weight-bytes", type=float, default=2.0, help="Bytes a weight takes in memory. (default: 2)"
    )
    again = commands.add_parser("replay", allow_abbrev=False, help="engine against simulator")
    again.add_argument("--steps", metavar="FILE", required=True, help="Steps to fit the device to.")
    again.add_argument("--num-prompts", type=int, default=50, help="(default: 50)")
    again.add_argument("--request-rate", type=float, default=2.0, help="(default: 2)")
    again.add_argument("--input-len", default="uniform:32:512", metavar="DIST")
    again.add_argument("--output-len", default="uniform:8:64", metavar="DIST")
    again.add_argument("--output-json", metavar="FILE", help="Write both results here too.")
    for command in (timed, again):
        EngineArgs.add_cli_args(command)
    return parser


# ---------------------------------------------------------------- timing steps


def steps(options: argparse.Namespace) -> None:
    """Writes the file that :func:`aserve.simulate.calibrate.read_steps` reads."""
    batches, contexts = _counts(options.batches, "batches"), _counts(options.contexts, "contexts")
    if options.repeats < 1:
        raise ConfigError(f"repeats must be at least 1, got {options.repeats}", param="repeats")
    found: dict[tuple[int, ...], list[tuple[float, int, float, float]]] = {}
    issued: list[tuple[StepPlan, float]] = []

    def take(step_seconds: float) -> None:
        (plan, seconds), *others = issued
        if others:
            raise RuntimeError("a step of the engine ran more than one plan")
        issued.clear()
        rows = len(plan.slots)
        pairs = sum(
            (2 * start + count + 1) * count / 2 for start, count in zip(plan.starts, plan.counts, strict=True)
        )
        context = sum(plan.starts) + plan.num_tokens
        # Decodes of one batch differ by a token of context each: they count as equal.
        key = (plan.num_tokens, len(plan.samples), rows, plan.num_prefill_rows, context // (64 * rows))
        found.setdefault(key, []).append((pairs, context, seconds, step_seconds - seconds))

    engine = open_engine(options, lambda plan, seconds: issued.append((plan, seconds)))
    try:
        config = engine.model_config
        longest = config.max_model_len - DECODES
        sizes = [(batch, context) for batch in batches for context in contexts if context <= longest]
        for round_ in range(options.repeats + 1):
            for batch, context in sizes:
                _generate(engine, batch, context, config.vocab_size, take)
            if round_ == 0:
                found.clear()  # the first round warms up
        shape = shape_of(config, options.weight_bytes)
    finally:
        engine.close()
    choose = min if options.best else statistics.median
    value = {
        "model": dataclasses.asdict(shape),
        "steps": [
            {
                "tokens": tokens,
                "samples": samples,
                "pairs": statistics.fmean(pairs for pairs, _, _, _ in each),
                "context": statistics.fmean(context for _, context, _, _ in each),
                "rows": rows,
                "seconds": choose([seconds for _, _, seconds, _ in each]),
                "host_seconds": choose([host for _, _, _, host in each]),
                "times": len(each),
            }
            for (tokens, samples, rows, *_), each in found.items()
        ],
    }
    Path(options.output_json).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    profile, error = calibrate.fit(_local(shape), calibrate.read_steps(options.output_json))
    print(json.dumps(as_json(profile)["device"], indent=2))
    print(f"{len(found)} kinds of steps; median error of the fitted device {error:.1%}", file=sys.stderr)


def open_engine(options: argparse.Namespace, note: Note | None = None) -> LLMEngine:
    """The engine that the flags describe. ``note`` is told each plan and the seconds it took."""
    from aserve.engine.llm_engine import LLMEngine

    engine_args = EngineArgs.from_cli_args(options)
    engine_args.skip_tokenizer_init = True
    config = engine_args.create_engine_config()
    base: Any = registry.executors.load(config.parallel.executor)

    class Timed(base):  # type: ignore[misc]
        def submit(self, plan: StepPlan) -> Future[StepResult]:
            started = time.perf_counter()
            future: Future[StepResult] = super().submit(plan)
            future.result()
            if note is not None:
                note(plan, time.perf_counter() - started)
            return future

    return LLMEngine.from_config(config, log_stats=False, executor_class=Timed)


def shape_of(config: ModelConfig, weight_bytes: float) -> ModelShape:
    """The shape of an engine's model. ConfigError: layers that are not those of a gated decoder."""
    text = config.text_config
    intermediate = getattr(text, "intermediate_size", None)
    if intermediate is None:
        raise ConfigError(f"{config.architecture} has no gated MLP, and the model of a step needs one")
    return ModelShape(
        config.num_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_kv_heads,
        config.head_size,
        int(intermediate),
        config.vocab_size,
        config.max_model_len,
        weight_bytes,
        4.0 if config.dtype == "float32" else 2.0,
        bool(getattr(text, "tie_word_embeddings", False)),
    )


def _generate(
    engine: LLMEngine, batch: int, context: int, vocab: int, take: Callable[[float], None] | None = None
) -> None:
    params = SamplingParams(temperature=0, max_tokens=DECODES, ignore_eos=True, detokenize=False)
    for index in range(batch):
        ids = [(7919 * index + 31 * position) % (vocab - 1) + 1 for position in range(context)]
        engine.add_request(f"{index}", None, params, prompt_token_ids=ids)
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        engine.step()
        if take is not None:
            take(time.perf_counter() - started)


def _local(shape: ModelShape) -> Profile:
    """Somewhere to start fitting from."""
    device = dataclasses.replace(PRESETS["cpu-smollm2"].device, memory=shape.stored_bytes * 2 + (4 << 30))
    return Profile("this machine", shape, device)


def _counts(text: str, name: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{name}: expected counts between commas, got {text!r}", param=name)
    return [int(part) for part in parts]


# ---------------------------------------------------------------- engine against simulator


def replay(options: argparse.Namespace) -> None:
    """Prints the figures of one trace from both, and the ratio."""
    measured = calibrate.read_steps(options.steps)
    if measured.model is None:
        raise ConfigError(f"{options.steps} does not say which model it is of", param="steps")
    profile, _ = calibrate.fit(_local(measured.model), measured)
    spec = TraceSpec(
        Lengths.parse(options.input_len, "input_len"),
        Lengths.parse(options.output_len, "output_len"),
        options.num_prompts,
        rate=options.request_rate,
        seed=options.seed,
    )
    engine = open_engine(options)
    try:
        limits = engine.core.limits
        _generate(engine, 4, 64, engine.model_config.vocab_size)
        real = play(engine, spec.requests(), Run(profile, limits, Serving(overlap=0)))
    finally:
        engine.close()
    simulated = Simulation(spec.requests(), profile, limits, Serving(overlap=0)).execute()
    results = {"engine": report.summary(real, {}), "simulator": report.summary(simulated, {})}
    print(side_by_side(results["engine"], results["simulator"]))
    if options.output_json:
        Path(options.output_json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def play(engine: LLMEngine, requests: Sequence[Request], run: Run) -> Run:
    """Puts the trace through the engine in real time, one step at a time, into ``run``."""
    vocab = engine.model_config.vocab_size
    live: dict[str, Outcome] = {}
    started = time.perf_counter()
    waiting = list(reversed(requests))
    while waiting or live:
        now = time.perf_counter() - started
        if waiting and not live and waiting[-1].arrival > now:
            time.sleep(waiting[-1].arrival - now)
            continue
        while waiting and waiting[-1].arrival <= now:
            request = waiting.pop()
            live[str(request.index)] = outcome = Outcome(request, request.arrival)
            run.outcomes.append(outcome)
            params = SamplingParams(
                temperature=0, max_tokens=request.output_tokens, ignore_eos=True, detokenize=False
            )
            ids = [each % (vocab - 1) + 1 for each in request.prompt_ids()]
            engine.add_request(str(request.index), None, params, prompt_token_ids=ids)
        outputs = engine.step()
        _take(outputs, live, time.perf_counter() - started, run.gaps)
    run.seconds = time.perf_counter() - started
    return run


def _take(outputs: Iterable[Any], live: dict[str, Outcome], now: float, gaps: array[float]) -> None:
    for output in outputs:
        outcome = live[output.request_id]
        tokens = len(output.outputs[0].token_ids)
        if tokens > outcome.tokens:
            if outcome.last is None:
                outcome.first = now
            else:
                gaps.append(now - outcome.last)
            outcome.last, outcome.tokens = now, tokens
        if output.finished:
            outcome.cause = FINISHED if tokens else TOO_LONG
            del live[output.request_id]


def side_by_side(real: dict[str, Any], simulated: dict[str, Any]) -> str:
    names = ["duration", "output_throughput"]
    names += [f"{mark}_{name}_ms" for name in ("ttft", "itl", "e2el") for mark in ("mean", "p50", "p99")]
    lines = [f"{'':<20}{'engine':>12}{'simulator':>12}{'ratio':>8}"]
    for name in names:
        ratio = simulated[name] / real[name] if real[name] else float("nan")
        lines.append(f"{name:<20}{real[name]:>12.2f}{simulated[name]:>12.2f}{ratio:>8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
