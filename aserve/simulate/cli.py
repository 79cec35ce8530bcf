"""The command ``aserve simulate``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from aserve.bench.metrics import parse_goodput, parse_percentiles
from aserve.errors import ConfigError
from aserve.simulate import compare, policy, report
from aserve.simulate.device import PRESETS, Profile, as_json, load_profile
from aserve.simulate.trace import INFINITE, Lengths, TraceSpec

DESCRIPTION = """Simulate serving: the engine's scheduler against a modelled device, in virtual time.
See aserve/simulate/README.md for the model, what it leaves out, and examples."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aserve simulate", description=DESCRIPTION, allow_abbrev=False)
    device = parser.add_argument_group("Device")
    device.add_argument(
        "--device",
        default="h100-8b",
        metavar="NAME|FILE",
        help=f"Model and device: {', '.join(PRESETS)}, or a JSON file. (default: h100-8b)",
    )
    device.add_argument("--show-device", action="store_true", help="Print it as JSON and end.")
    device.add_argument(
        "--calibrate",
        metavar="FILE",
        help="Fit the device's figures to steps as `python -m aserve.simulate.measure` writes them.",
    )
    device.add_argument("--max-model-len", type=int, help="Context length, in place of the model's.")
    load = parser.add_argument_group("Trace")
    load.add_argument("--trace", metavar="FILE", help="JSON Lines of requests, instead of drawn ones.")
    load.add_argument("--num-prompts", type=int, help="Requests. (default: 1000, or all within --duration)")
    load.add_argument("--duration", type=float, help="Seconds within which requests arrive.")
    load.add_argument(
        "--request-rate",
        type=float,
        help="Requests per second; inf sends all at once. (default: a file's own times, else inf)",
    )
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="Shape of the gamma distribution of the gaps: 1 is a Poisson process, less comes in bursts, "
        "more comes evenly. (default: 1)",
    )
    load.add_argument(
        "--max-concurrency",
        type=int,
        help="Most requests at a time: with all arrivals at once, a closed loop of so many clients.",
    )
    lengths = "N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:MAX]"
    load.add_argument("--input-len", default="1024", metavar="DIST", help=f"{lengths}. (default: 1024)")
    load.add_argument("--output-len", default="128", metavar="DIST", help="The same. (default: 128)")
    load.add_argument(
        "--prefix-len", type=int, default=0, help="Shared tokens before each prompt. (default: 0)"
    )
    load.add_argument("--num-prefixes", type=int, default=1, help="Different shared prefixes. (default: 1)")
    load.add_argument(
        "--priorities", default="0", metavar="VALUE:WEIGHT,...", help="Priorities to draw. (default: 0)"
    )
    load.add_argument("--seed", type=int, default=0, help="(default: 0)")
    choices = parser.add_argument_group("Policy")
    for option in policy.options().values():
        _add_option(choices, option)
    many = parser.add_argument_group("Many simulations")
    many.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="NAME=V,V",
        help="Simulate every combination of these choices: one table.",
    )
    many.add_argument(
        "--sweep",
        metavar="RATE,...|auto",
        help="Simulate these request rates; auto searches for "
        "the highest at which enough requests keep within --goodput.",
    )
    many.add_argument(
        "--attainment", type=float, default=0.9, help="Enough, for --sweep auto. (default: 0.9)"
    )
    many.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="Processes. (default: one a core)"
    )
    results = parser.add_argument_group("Results")
    results.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="Count the requests that keep within these limits, such as ttft:500 tpot:50.",
    )
    results.add_argument("--metric-percentiles", default="50,90,99", help="(default: 50,90,99)")
    results.add_argument("--output-json", metavar="FILE", help="Write the figures here too.")
    results.add_argument(
        "--save-detailed", action="store_true", help="With use over time and every request's own times."
    )
    return parser


def main(argv: list[str]) -> int:
    """Runs ``aserve simulate`` with these arguments; returns the exit status (2 for unusable settings)."""
    options = parser().parse_args(argv)
    try:
        return _run(options)
    except ConfigError as error:
        print(f"aserve simulate: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    profile = load_profile(options.device)
    if options.calibrate:
        profile = _calibrated(profile, options.calibrate)
    if options.max_model_len is not None:
        model = dataclasses.replace(profile.model, max_model_len=options.max_model_len)
        profile = dataclasses.replace(profile, model=model)
    if options.show_device:
        print(json.dumps(as_json(profile), indent=2))
        return 0
    scenario = _scenario(options, profile)
    started = time.perf_counter()
    if options.compare or options.sweep:
        value = _many(options, scenario)
    else:
        run = compare.simulate(scenario)
        value = report.summary(run, scenario.goodput, scenario.percentiles)
        rate = options.request_rate if options.request_rate is not None else INFINITE
        print(report.block(value, scenario.goodput, rate=rate))
        if options.save_detailed:
            value |= report.details(run)
    print(f"simulated in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    if options.output_json:
        Path(options.output_json).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return 0


def _many(options: argparse.Namespace, scenario: compare.Scenario) -> dict[str, Any]:
    combinations = _usable(scenario, compare.grid([policy.parse_choice(text) for text in options.compare]))
    labels: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    if options.sweep == "auto":
        for chosen in combinations:
            found = compare.find_saturation(
                scenario.with_choices(chosen), share=options.attainment, jobs=options.jobs
            )
            labels += [chosen | {"rate": rate} for rate in found.rates]
            results += found.results
            notes.append(chosen | {"capacity": found.capacity, "saturation_rate": found.rate})
    else:
        rates = _rates(options.sweep) if options.sweep else [None]
        scenarios = []
        for chosen in combinations:
            for rate in rates:
                each = scenario.with_choices(chosen)
                scenarios.append(each if rate is None else each.at_rate(rate))
                labels.append(chosen if rate is None else chosen | {"rate": rate})
        results = compare.summarise_all(scenarios, options.jobs)
    print(report.table(labels, results, bool(scenario.goodput)))
    for note in notes:
        print(_saturation_line(note, options.attainment, bool(scenario.goodput)))
    runs = [{"choices": label, **result} for label, result in zip(labels, results, strict=True)]
    return {"runs": runs} | ({"saturation": notes} if notes else {})


def _usable(scenario: compare.Scenario, combinations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that the engine would start with; the others are named on standard error."""
    usable = []
    for chosen in combinations:
        try:
            policy.resolve(scenario.chosen | chosen, scenario.profile)
        except ConfigError as error:
            named = ", ".join(f"{name}={value}" for name, value in chosen.items())
            print(f"left out: {named}: {error}", file=sys.stderr)
        else:
            usable.append(chosen)
    if not usable:
        raise ConfigError("no combination of choices can work", param="compare")
    return usable


def _saturation_line(note: dict[str, Any], share: float, limited: bool) -> str:
    chosen = ", ".join(f"{k}={v}" for k, v in note.items() if k not in ("capacity", "saturation_rate"))
    line = f"{chosen + ': ' if chosen else ''}capacity {note['capacity']:.2f} req/s"
    if not limited:
        return line + "; give --goodput for the rate at which requests keep within limits"
    if note["saturation_rate"] is None:
        return line + f"; at no rate simulated do {share:.0%} of requests keep within the limits"
    return (
        line + f"; {share:.0%} of requests keep within the limits up to {note['saturation_rate']:.2f} req/s"
    )


def _scenario(options: argparse.Namespace, profile: Profile) -> compare.Scenario:
    for name in ("max_concurrency", "jobs", "num_prompts"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}", param=name)
    if not 0 < options.attainment <= 1:
        raise ConfigError(
            f"attainment must be above 0 and at most 1, got {options.attainment}", param="attainment"
        )
    if options.save_detailed and not options.output_json:
        raise ConfigError("save_detailed needs --output-json", param="save_detailed")
    rate = options.request_rate
    if rate is not None and not rate > 0:
        raise ConfigError(f"request_rate must be above 0, got {rate}", param="request_rate")
    chosen = {name: getattr(options, name) for name in policy.options() if getattr(options, name) is not None}
    percentiles = sorted({50.0, 99.0, *parse_percentiles(options.metric_percentiles)})
    spec = None
    if not options.trace:
        count = options.num_prompts
        if count is None and options.duration is None:
            count = 1000
        spec = TraceSpec(
            Lengths.parse(options.input_len, "input_len"),
            Lengths.parse(options.output_len, "output_len"),
            count,
            options.duration,
            INFINITE if rate is None else rate,
            options.burstiness,
            options.prefix_len,
            options.num_prefixes,
            _priorities(options.priorities),
            options.seed,
        )
    scenario = compare.Scenario(
        profile,
        spec,
        options.trace,
        rate,
        options.num_prompts,
        chosen,
        options.max_concurrency,
        parse_goodput(options.goodput),
        tuple(percentiles),
    )
    if not options.compare:
        policy.resolve(chosen, profile)
    return scenario


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(rate > 0 for rate in rates):
        raise ConfigError(f"expected rates above 0 between commas, or auto, got {text!r}", param="sweep")
    return rates


def _priorities(text: str) -> tuple[tuple[int, float], ...]:
    found = []
    for part in text.split(","):
        value, separator, weight = part.partition(":")
        try:
            found.append((int(value), float(weight) if separator else 1.0))
        except ValueError:
            raise ConfigError(f"expected VALUE:WEIGHT,..., got {text!r}", param="priorities") from None
    if not all(weight > 0 for _, weight in found):
        raise ConfigError("a priority's weight must be above 0", param="priorities")
    return tuple(found)


def _calibrated(profile: Profile, path: str) -> Profile:
    from aserve.simulate.calibrate import fit, read_steps

    fitted, error = fit(profile, read_steps(path))
    print(f"calibrated with {path}: median error of a step {error:.1%}", file=sys.stderr)
    return fitted


def _add_option(group: argparse._ArgumentGroup, option: policy.Option) -> None:
    flags = ["--" + option.name.replace("_", "-")]
    if option.name in policy.ENGINE_NAMES:
        flags.append("--" + policy.ENGINE_NAMES[option.name].replace("_", "-"))

    def convert(text: str) -> Any:
        try:
            return option.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    default = option.default
    if default is None:
        shown = "none" if option.optional else "worked out"
    else:
        shown = ("on" if default else "off") if option.kind is bool else str(default)
    settings: dict[str, Any] = {"dest": option.name, "type": convert, "default": None}
    settings["help"] = f"{option.help} (default: {shown})".replace("%", "%%").strip()
    if option.kind is bool:
        group.add_argument(*flags, nargs="?", const=True, metavar="on|off", **settings)
    else:
        group.add_argument(*flags, metavar=option.kind.__name__.upper(), **settings)
