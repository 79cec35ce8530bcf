"""Drawn and read traces."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics

import pytest

from aserve.bench.serve import arrival_gaps
from aserve.errors import ConfigError
from aserve.simulate.trace import INFINITE, Lengths, Request, TraceSpec, read_trace

FIXED = Lengths.parse("100", "input_len")


def spec(**more) -> TraceSpec:
    return TraceSpec(**({"inputs": FIXED, "outputs": FIXED, "count": 2000, "rate": 5.0} | more))


def gaps(requests: list[Request]) -> list[float]:
    arrivals = [0.0, *(request.arrival for request in requests)]
    return [after - before for before, after in itertools.pairwise(arrivals)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_asked_for(burstiness: float) -> None:
    found = gaps(spec(burstiness=burstiness).requests())
    assert statistics.fmean(found) == pytest.approx(0.2, rel=0.1)
    # A gamma distribution's coefficient of variation is 1 / sqrt(shape).
    assert statistics.pstdev(found) / statistics.fmean(found) == pytest.approx(
        1 / math.sqrt(burstiness), rel=0.1
    )


def test_arrivals_are_those_of_the_serving_benchmark() -> None:
    found = gaps(spec(count=50, burstiness=0.5, seed=7).requests())
    assert found == pytest.approx(arrival_gaps(50, 5.0, 0.5, 7))


def test_a_rate_scales_times_and_changes_nothing_else() -> None:
    lengths = Lengths.parse("lognormal:100:1", "input_len")
    slow, fast = (spec(inputs=lengths, count=50, rate=rate).requests() for rate in (1.0, 4.0))
    assert [each.arrival for each in slow] == pytest.approx([4 * each.arrival for each in fast])
    assert [each.input_tokens for each in slow] == [each.input_tokens for each in fast]
    assert all(each.arrival == 0 for each in spec(rate=INFINITE).requests())


def test_a_duration_ends_the_trace() -> None:
    found = spec(count=None, duration=100.0).requests()
    assert 400 < len(found) < 600
    assert found[-1].arrival <= 100.0


@pytest.mark.parametrize(
    ("text", "low", "high", "median"),
    [
        ("7", 7, 7, 7),
        ("uniform:3:9", 3, 9, 6),
        ("lognormal:200:0.5", 20, 2000, 200),
        ("lognormal:200:0.5:300", 20, 300, 200),
    ],
)
def test_lengths(text: str, low: int, high: int, median: int) -> None:
    rng = random.Random(0)
    drawn = [Lengths.parse(text, "input_len").draw(rng) for _ in range(4000)]
    assert min(drawn) >= low and max(drawn) <= high
    assert statistics.median(drawn) == pytest.approx(median, rel=0.05)


@pytest.mark.parametrize(
    "text",
    ["", "x", "0", "1.5", "nan", "uniform:5", "uniform:9:3", "lognormal:5", "lognormal:5:-1", "zipf:1"],
)
def test_other_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Lengths.parse(text, "input_len")
    assert caught.value.param == "input_len"


def common(one: list[int], other: list[int]) -> int:
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def test_prompts_share_exactly_their_prefix() -> None:
    found = spec(count=60, prefix_tokens=37, num_prefixes=3).requests()
    prompts = [request.prompt_ids() for request in found]
    assert {request.prefix for request in found} == {0, 1, 2}
    assert all(
        len(prompt) == request.input_tokens == 137 for prompt, request in zip(prompts, found, strict=True)
    )
    for one in range(60):
        for other in range(one):
            same = found[one].prefix == found[other].prefix
            assert common(prompts[one], prompts[other]) == (37 if same else 0)
    assert prompts == [
        request.prompt_ids() for request in spec(count=60, prefix_tokens=37, num_prefixes=3).requests()
    ]


def test_ids_fit_32_bits_in_prompts_of_any_length() -> None:
    prompt = Request(2**20, 0.0, 200_000, 1, prefix=5, prefix_tokens=70_000).prompt_ids()
    assert len(prompt) == 200_000
    assert min(prompt) >= 0 and max(prompt) < 2**31


def test_priorities_are_drawn_by_weight() -> None:
    found = spec(priorities=((0, 3.0), (5, 1.0))).requests()
    assert sum(request.priority == 5 for request in found) == pytest.approx(500, abs=70)


def test_no_end_and_no_rate_are_refused() -> None:
    for wrong in (
        {"count": None},
        {"count": None, "duration": 5.0, "rate": INFINITE},
        {"count": 0},
        {"rate": 0.0},
        {"burstiness": 0.0},
        {"num_prefixes": 0},
        {"duration": -1.0},
    ):
        with pytest.raises(ConfigError):
            spec(**wrong)


def write(tmp_path, *lines) -> str:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_file_of_lengths_and_of_ids(tmp_path) -> None:
    path = write(
        tmp_path,
        {"arrival": 12.5, "prompt_tokens": 40, "output_tokens": 7, "priority": 2},
        "",
        {"arrival": 10.0, "prompt": [4, 5, 6], "output": [1, 2]},
    )
    first, second = read_trace(path)
    assert (first.index, first.arrival, first.input_tokens, first.output_tokens) == (0, 0.0, 3, 2)
    assert (first.prompt_ids(), first.output) == ([4, 5, 6], (1, 2))
    assert (second.arrival, second.input_tokens, second.output_tokens, second.priority) == (2.5, 40, 7, 2)


def test_a_mooncake_file(tmp_path) -> None:
    path = write(
        tmp_path,
        {"timestamp": 0, "input_length": 1200, "output_length": 52, "hash_ids": [0, 1, 2]},
        {"timestamp": 105, "input_length": 1800, "output_length": 26, "hash_ids": [0, 1, 4, 5]},
        {"timestamp": 200, "input_length": 700, "output_length": 3, "hash_ids": [9]},
    )
    found = read_trace(path)
    assert [request.arrival for request in found] == pytest.approx([0, 0.105, 0.2])
    prompts = [request.prompt_ids() for request in found]
    assert [len(prompt) for prompt in prompts] == [1200, 1800, 700]
    assert common(prompts[0], prompts[1]) == 1024
    assert common(prompts[0], prompts[2]) == 0


def test_a_rate_stretches_a_file(tmp_path) -> None:
    path = write(tmp_path, *({"arrival": at, "prompt_tokens": 1, "output_tokens": 1} for at in range(11)))
    assert read_trace(path, rate=0.5)[-1].arrival == pytest.approx(22)
    assert len(read_trace(path, count=4)) == 4
    assert {request.arrival for request in read_trace(path, rate=INFINITE)} == {0.0}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        {"prompt_tokens": 4},
        {"prompt_tokens": 0, "output_tokens": 1},
        {"prompt_tokens": 4.5, "output_tokens": 1},
        {"prompt": ["a"], "output_tokens": 1},
        {"arrival": -1, "prompt_tokens": 4, "output_tokens": 1},
        {"arrival": [], "prompt_tokens": 4, "output_tokens": 1},
    ],
)
def test_a_wrong_line_is_named(line, tmp_path) -> None:
    with pytest.raises(ConfigError, match="line 2"):
        read_trace(write(tmp_path, {"prompt_tokens": 4, "output_tokens": 1}, line))


def test_an_empty_or_missing_file_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no request"):
        read_trace(write(tmp_path, ""))
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(str(tmp_path / "none"))
