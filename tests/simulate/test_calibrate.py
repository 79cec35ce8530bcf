"""Fitting finds the figures that made the steps."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from aserve.errors import ConfigError
from aserve.simulate.calibrate import Measured, MeasuredStep, fit, read_steps
from aserve.simulate.device import PRESETS, SMOLLM2_135M

TRUTH = dataclasses.replace(
    PRESETS["cpu-smollm2"].device,
    bandwidth=20e9,
    bandwidth_efficiency=0.6,
    flops=200e9,
    flops_efficiency=0.55,
    attention_efficiency=0.2,
    step_seconds=2e-3,
    row_seconds=50e-6,
)


def steps(noise: float = 0.0) -> list[MeasuredStep]:
    model = dataclasses.replace(PRESETS["cpu-smollm2"], device=TRUTH).step_model(16)
    rng = random.Random(0)
    found = []
    for rows in (1, 2, 4, 8, 16, 32, 64):
        for context in (32, 256, 1024, 4096):
            counts = (rows, rows, rows * context, rows * context, rows)
            found.append((counts, model.cost(*counts).seconds))
    for length in (16, 64, 256, 1024, 2048):
        counts = (length, 1, length * (length + 1) // 2, length, 1)
        found.append((counts, model.cost(*counts).seconds))
    return [MeasuredStep(*counts, seconds * rng.uniform(1 - noise, 1 + noise)) for counts, seconds in found]


@pytest.mark.parametrize(("noise", "close"), [(0.0, 0.02), (0.05, 0.15)])
def test_fitting_recovers_the_device(noise: float, close: float) -> None:
    fitted, error = fit(PRESETS["cpu-smollm2"], Measured(steps(noise), SMOLLM2_135M))
    assert error < 0.005 + noise
    device = fitted.device
    assert device.bandwidth * device.bandwidth_efficiency == pytest.approx(12e9, rel=close)
    assert device.flops * device.flops_efficiency == pytest.approx(110e9, rel=close)
    assert device.flops * device.attention_efficiency == pytest.approx(40e9, rel=2 * close)
    assert device.step_seconds == pytest.approx(2e-3, rel=2 * close)
    assert max(device.bandwidth_efficiency, device.flops_efficiency, device.attention_efficiency) <= 1
    assert fitted.name == "cpu-smollm2 (calibrated)"


def test_a_device_faster_than_stated_raises_the_peak() -> None:
    quick = [dataclasses.replace(step, seconds=step.seconds / 50) for step in steps()]
    fitted, error = fit(PRESETS["cpu-smollm2"], Measured(quick))
    assert error < 0.01
    assert fitted.device.bandwidth == pytest.approx(600e9, rel=0.05)


def test_host_times_are_a_line_over_the_tokens() -> None:
    timed = [dataclasses.replace(step, host_seconds=2e-4 + 1e-5 * step.samples) for step in steps()]
    device = fit(PRESETS["cpu-smollm2"], Measured(timed))[0].device
    assert (device.host_seconds, device.host_token_seconds) == pytest.approx((2e-4, 1e-5))
    some = [*timed[:-1], steps()[-1]]
    assert fit(PRESETS["cpu-smollm2"], Measured(some))[0].device.host_seconds == TRUTH.host_seconds


def test_a_file_of_steps(tmp_path) -> None:
    path = tmp_path / "steps.json"
    each = [dataclasses.asdict(step) for step in steps()]
    path.write_text(json.dumps({"model": dataclasses.asdict(SMOLLM2_135M), "steps": each}))
    measured = read_steps(str(path))
    assert (measured.steps, measured.model) == (steps(), SMOLLM2_135M)
    for wrong in (
        "[",
        "{}",
        json.dumps({"steps": each[:3]}),
        json.dumps({"steps": [each[0] | {"seconds": 0}] * 9}),
        json.dumps({"steps": [each[0] | {"rows": "x"}] * 9}),
        json.dumps({"steps": each, "model": {"layers": 3}}),
    ):
        path.write_text(wrong)
        with pytest.raises(ConfigError):
            read_steps(str(path))
    with pytest.raises(ConfigError, match="No such file"):
        read_steps(str(tmp_path / "none"))
