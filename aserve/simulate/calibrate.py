"""Device figures from measured steps.

A file of steps is a JSON object with ``steps``: a list of objects with the counts of
:meth:`aserve.simulate.device.StepModel.cost` (``tokens``, ``samples``, ``pairs``, ``context``, ``rows``),
the measured ``seconds``, and perhaps ``host_seconds``, what the engine's loop spent besides. With ``model``
(the fields of ModelShape) the steps are of that model. ``python -m aserve.simulate.measure`` writes such
files.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aserve.errors import ConfigError
from aserve.simulate.device import Device, ModelShape, Profile

_FIELDS = ("tokens", "samples", "pairs", "context", "rows", "seconds", "host_seconds")
_ROUNDS = 60
_NUDGE = 1e-4


@dataclass(frozen=True)
class MeasuredStep:
    tokens: int
    samples: int
    pairs: float
    context: int
    rows: int
    seconds: float
    host_seconds: float | None = None


@dataclass(frozen=True)
class Measured:
    """Steps, and the model they are of where the file says so."""

    steps: Sequence[MeasuredStep]
    model: ModelShape | None = None


def read_steps(path: str) -> Measured:
    """ConfigError: no such file, or not as above."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        steps = [
            MeasuredStep(**{name: _positive(step, name) for name in _FIELDS if step.get(name) is not None})
            for step in value["steps"]
        ]
        model = ModelShape(**value["model"]) if "model" in value else None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", param="calibrate") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: not a file of measured steps: {error}", param="calibrate") from None
    if len(steps) < 8:
        raise ConfigError(f"{path}: {len(steps)} steps are too few to fit to", param="calibrate")
    return Measured(steps, model)


def fit(profile: Profile, measured: Measured) -> tuple[Profile, float]:
    """The profile whose step times come closest, and the median relative error that remains.

    Five figures are fitted: the bandwidth and the linear and attention rates that kernels reach, the fixed
    seconds of a step and of a row. What is lowered is the sum of squared logarithms of ratios, so a step of
    1 ms weighs as much as one of 100 ms. Every step reads the weights, so the fixed seconds are told from
    the bandwidth by steps of long context alone. Host times are a straight line over the tokens drawn.
    """
    if measured.model is not None:
        profile = dataclasses.replace(profile, model=measured.model)
    steps = measured.steps
    shortest = min(step.seconds for step in steps)

    def errors(point: Any) -> Any:
        device = _device(profile.device, [math.exp(value) for value in point])
        cost = dataclasses.replace(profile, device=device).step_model(1).cost
        return np.array([math.log(_predict(cost, step) / step.seconds) for step in steps])

    device = profile.device
    start = [
        device.bandwidth * device.bandwidth_efficiency,
        device.flops * device.flops_efficiency,
        device.flops * device.attention_efficiency,
        shortest / 10,
        shortest / 100,
    ]
    point = _least_squares(errors, np.log(start))
    if all(step.host_seconds is not None for step in steps):
        profile = dataclasses.replace(profile, device=_with_host(device, steps))
    fitted = dataclasses.replace(
        profile, name=f"{profile.name} (calibrated)", device=_device(profile.device, np.exp(point).tolist())
    )
    return fitted, float(np.median(np.abs(np.expm1(errors(point)))))


def _predict(cost: Callable[..., Any], step: MeasuredStep) -> float:
    seconds: float = cost(step.tokens, step.samples, step.pairs, step.context, step.rows).seconds
    return seconds


def _with_host(device: Device, steps: Sequence[MeasuredStep]) -> Device:
    tokens = np.array([step.samples for step in steps], dtype=np.float64)
    seconds = np.array([step.host_seconds for step in steps])
    spread = tokens - tokens.mean()
    per_token = float(spread @ seconds / (spread @ spread)) if spread.any() else 0.0
    per_token = max(0.0, per_token)
    fixed = max(0.0, float(seconds.mean() - per_token * tokens.mean()))
    return dataclasses.replace(device, host_seconds=fixed, host_token_seconds=per_token)


def _least_squares(errors: Callable[[Any], Any], start: Any) -> Any:
    """Levenberg's and Marquardt's method (Marquardt 1963) with differences for derivatives."""
    point, found = start, errors(start)
    damping = 1.0
    for _ in range(_ROUNDS):
        slope = np.stack([(errors(point + move) - found) / _NUDGE for move in np.eye(len(point)) * _NUDGE], 1)
        square = slope.T @ slope
        step = np.linalg.solve(square + damping * np.eye(len(point)), -slope.T @ found)
        moved = point + np.clip(step, -2.0, 2.0)
        after = errors(moved)
        if after @ after < found @ found:
            point, found = moved, after
            damping /= 4
        else:
            damping *= 3
    return point


def _device(device: Device, point: Sequence[float]) -> Device:
    bandwidth, linear, attention, step, row = point
    peak = max(device.flops, linear, attention)
    reads = max(device.bandwidth, bandwidth)
    return dataclasses.replace(
        device,
        bandwidth=reads,
        flops=peak,
        bandwidth_efficiency=bandwidth / reads,
        flops_efficiency=linear / peak,
        attention_efficiency=attention / peak,
        step_seconds=step,
        row_seconds=row,
    )


def _positive(step: dict[str, Any], name: str) -> Any:
    value = step[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    if name in ("tokens", "rows", "seconds") and not value > 0:
        raise ValueError(f"{name} must be above 0")
    return value
