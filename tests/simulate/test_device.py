"""The roofline, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest

from aserve.errors import ConfigError
from aserve.messages.step import StepPlan
from aserve.simulate.device import PRESETS, Device, ModelShape, Profile, as_json, load_profile

# layer: q 8x8, k and v 8x4 each, o 8x8 = 192; gate, up, down 8x16 each = 384; 576 in all, two layers.
MODEL = ModelShape(
    layers=2, hidden=8, heads=4, kv_heads=2, head_size=2, intermediate=16, vocab=100, max_model_len=64
)
DEVICE = Device(
    bandwidth=1000.0,
    flops=10000.0,
    memory=20000.0,
    bandwidth_efficiency=0.5,
    flops_efficiency=0.5,
    attention_efficiency=0.25,
    step_seconds=0.125,
    row_seconds=0.25,
    memory_share=1.0,
)
PROFILE = Profile("tiny", MODEL, DEVICE)


def plan_of(rows: list[tuple[int, int]], samples: int) -> StepPlan:
    """rows: (start, count), prefills first."""
    return StepPlan(
        0,
        list(range(len(rows))),
        [start for start, _ in rows],
        [count for _, count in rows],
        [(row, row) for row in range(samples)],
        num_prefill_rows=sum(count > 1 for _, count in rows),
    )


def test_counts_of_the_shape() -> None:
    assert MODEL.layer_weights == 576
    assert MODEL.stored_bytes == (2 * 576 + 2 * 8 * 100) * 2
    assert dataclasses.replace(MODEL, tied_head=True).stored_bytes == (2 * 576 + 8 * 100) * 2
    assert MODEL.kv_token_bytes == 2 * 2 * 2 * 2 * 2
    assert 8.0e9 < PRESETS["h100-8b"].model.stored_bytes / 2 < 8.1e9
    assert 70.5e9 < PRESETS["h100x4-70b"].model.stored_bytes / 2 < 70.7e9
    assert 134.4e6 < PRESETS["cpu-smollm2"].model.stored_bytes / 0.625 < 134.6e6


def test_a_decode_is_bound_by_reading() -> None:
    cost = PROFILE.step_model(4).of_plan(plan_of([(9, 1)], 1))
    # 1152 + 800 weights of 2 bytes at 500 bytes/s against 3904 operations at 5000 a second.
    assert cost.linear == pytest.approx(3904 / 500)
    # Ten tokens read and one written, 32 bytes each, against 4*4*2*2*10 operations at 2500 a second.
    assert cost.attention == pytest.approx(11 * 32 / 500)
    assert cost.fixed == 0.375
    assert cost.exchange == 0
    assert cost.seconds == pytest.approx(3904 / 500 + 352 / 500 + 0.375)
    assert cost.bytes == 3904 + 352
    assert cost.operations == 3904 + 640


def test_a_prompt_is_bound_by_computing() -> None:
    cost = PROFILE.step_model(4).of_plan(plan_of([(0, 40)], 1))
    assert cost.linear == pytest.approx((2 * 1152 * 40 + 2 * 800) / 5000)
    assert cost.attention == pytest.approx(64 * (40 * 41 / 2) / 2500)


def test_an_unfinished_chunk_needs_no_head() -> None:
    model = PROFILE.step_model(4)
    assert model.of_plan(plan_of([(0, 2)], 0)).bytes == 2304 + 4 * 32
    assert model.of_plan(plan_of([(0, 2)], 1)).bytes == 2304 + 1600 + 4 * 32


def test_pairs_and_context_are_those_of_every_token() -> None:
    rng = random.Random(1)
    model = PROFILE.step_model(4)
    for _ in range(50):
        rows = [(rng.randrange(30), rng.randrange(2, 20)) for _ in range(rng.randrange(4))]
        rows += [(rng.randrange(40), 1) for _ in range(rng.randrange(1, 5))]
        pairs = sum(position + 1 for start, count in rows for position in range(start, start + count))
        context = sum(start + count for start, count in rows)
        tokens = sum(count for _, count in rows)
        expected = model.cost(tokens, len(rows), pairs, context, len(rows))
        assert model.of_plan(plan_of(rows, len(rows))) == expected


def test_a_window_ends_what_a_token_sees() -> None:
    rng = random.Random(2)
    model = PROFILE.step_model(4, window=7)
    for _ in range(100):
        rows = [(rng.randrange(20), rng.randrange(2, 20)) for _ in range(rng.randrange(3))]
        rows += [(rng.randrange(20), 1) for _ in range(rng.randrange(1, 5))]
        seen = [
            set(range(max(0, position - 6), position + 1))
            for start, count in rows
            for position in range(start, start + count)
        ]
        read = [set(range(max(0, start - 6), start + count)) for start, count in rows]
        expected = PROFILE.step_model(4).cost(
            sum(count for _, count in rows), 1, sum(map(len, seen)), sum(map(len, read)), len(rows)
        )
        assert model.of_plan(plan_of(rows, 1)) == expected


def test_copied_and_moved_blocks_cost_their_bytes() -> None:
    model = dataclasses.replace(PROFILE, device=dataclasses.replace(DEVICE, swap_bandwidth=64.0)).step_model(
        4
    )
    plain = model.cost(1, 1, 10, 10, 1)
    assert model.cost(1, 1, 10, 10, 1, copied=3).bytes == plain.bytes + 3 * 2 * 4 * 32
    assert model.cost(1, 1, 10, 10, 1, swapped=3).fixed == plain.fixed + 3 * 4 * 32 / 64


def test_two_devices_share_the_work_and_exchange_activations() -> None:
    device = dataclasses.replace(
        DEVICE, count=2, link_bandwidth=100.0, link_efficiency=1.0, reduce_seconds=0.01
    )
    cost = dataclasses.replace(PROFILE, device=device).step_model(4).of_plan(plan_of([(9, 1)], 1))
    alone = PROFILE.step_model(4).of_plan(plan_of([(9, 1)], 1))
    assert cost.linear == pytest.approx(alone.linear / 2)
    assert cost.attention == pytest.approx(alone.attention / 2)
    # Two all-reduces a layer; over two devices each moves all 8 activations of 2 bytes once.
    assert cost.exchange == pytest.approx(4 * 0.01 + 4 * 16 / 100)
    assert cost.bytes == alone.bytes


def test_more_devices_than_heads_repeat_them() -> None:
    wide = dataclasses.replace(PROFILE, device=dataclasses.replace(DEVICE, count=4))
    assert wide.kv_share == 0.5
    assert wide.num_blocks(4) == int((20000 - 5504 / 4) / (32 * 0.5 * 4))


def test_blocks_are_what_memory_leaves() -> None:
    assert PROFILE.num_blocks(4) == int((20000 - 5504) / (32 * 4))
    small = dataclasses.replace(PROFILE, device=dataclasses.replace(DEVICE, memory=5000.0))
    with pytest.raises(ConfigError, match="leave no room"):
        small.num_blocks(4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_file(name: str, tmp_path) -> None:
    path = tmp_path / "device.json"
    path.write_text(json.dumps(as_json(load_profile(name))))
    assert load_profile(str(path)) == PRESETS[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": {"bandwith": 1}}, "has no"),
        ({"device": {"bandwidth": "fast"}}, "must be a number"),
        ({"device": {"bandwidth": -1, "flops": 1, "memory": 1}}, "above 0"),
        ({"device": {"bandwidth": 1, "flops": 1, "memory": 1, "memory_share": 2}}, "at most 1"),
        ({"device": {"bandwidth": 1}}, "missing"),
        ({"model": []}, "has no"),
        ({"model": None}, "has no"),
    ],
)
def test_a_wrong_file_is_refused(change: dict, message: str, tmp_path) -> None:
    path = tmp_path / "device.json"
    path.write_text(json.dumps(as_json(PROFILE) | change))
    with pytest.raises(ConfigError, match=message):
        load_profile(str(path))


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="h100-8b"):
        load_profile("h9000")
    with pytest.raises(ConfigError, match="must be above 0"):
        dataclasses.replace(PROFILE, device=dataclasses.replace(DEVICE, flops=math.nan))
