"""Choices follow the scheduler's limits."""

from __future__ import annotations

import dataclasses

import pytest

from aserve.core.scheduler import SchedulerLimits
from aserve.errors import ConfigError
from aserve.simulate import policy
from aserve.simulate.device import PRESETS

H100 = PRESETS["h100-8b"]


def test_every_limit_of_the_scheduler_is_a_choice_and_says_what_it_is() -> None:
    options = policy.options()
    names = {field.name for field in dataclasses.fields(SchedulerLimits)}
    assert names <= options.keys()
    undescribed = {name for name, option in options.items() if not option.help}
    assert undescribed <= {"num_blocks", "block_size"}


def test_unset_limits_are_what_the_engine_takes() -> None:
    limits, serving = policy.resolve({}, H100)
    assert limits.chunked_prefill and limits.max_num_batched_tokens == 512
    assert limits.num_blocks == H100.num_blocks(16)
    assert serving.overlap == 1
    limits, _ = policy.resolve({"chunked_prefill": False}, H100)
    assert limits.max_num_batched_tokens == 8192
    limits, _ = policy.resolve({"max_num_seqs": 700}, H100)
    assert limits.max_num_batched_tokens == 700


def test_a_choice_has_the_flags_name_too() -> None:
    for text in ("chunked_prefill=on,off", "enable-chunked-prefill=on,off"):
        option, values = policy.parse_choice(text)
        assert (option.name, values) == ("chunked_prefill", [True, False])
    assert policy.parse_choice("num_gpu_blocks_override=50")[0].name == "num_blocks"
    assert policy.parse_choice("timeout=none,2.5")[1] == [None, 2.5]


@pytest.mark.parametrize(
    "text", ["", "overlap", "overlap=", "colour=red", "max_num_seqs=many", "chunked_prefill=2"]
)
def test_other_choices_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        policy.parse_choice(text)


@pytest.mark.parametrize(
    "chosen",
    [
        {"max_num_batched_tokens": 8},
        {"max_num_batched_tokens": 512, "chunked_prefill": False},
        {"max_num_seqs": 0},
        {"block_size": 0},
        {"num_blocks": 0},
        {"overlap": 2},
        {"timeout": 0.0},
        {"max_waiting_requests": 0},
        {"delay_factor": -1.0},
        {"preemption_mode": "give up"},
        {"preemption_mode": "swap"},
        {"prefix_caching": True, "window": 64},
    ],
)
def test_limits_that_cannot_work_are_refused(chosen: dict) -> None:
    with pytest.raises(ConfigError):
        policy.resolve(chosen, H100)
