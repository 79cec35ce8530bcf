from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from aserve.bench import datasets
from aserve.errors import ConfigError


class Words:
    """One token per word."""

    def encode(self, text: str) -> list[str]:
        return text.split()

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_the_fixed_work_is_that_of_its_index() -> None:
    requests = datasets.random_requests(3, 128, 64, 0.0, 0)
    draw = random.Random(2)
    assert requests[2].prompt == [draw.randrange(100, 40000) for _ in range(128)]
    assert {(each.prompt_tokens, each.output_tokens) for each in requests} == {(128, 64)}


def test_lengths_vary_within_the_ratio_and_repeat_with_the_seed() -> None:
    requests = datasets.random_requests(300, 100, 20, 0.5, 3)
    inputs = [each.prompt_tokens for each in requests]
    outputs = [each.output_tokens for each in requests]
    assert 50 <= min(inputs) < 60 and 140 < max(inputs) <= 150
    assert (min(outputs), max(outputs)) == (10, 30)
    assert all(len(each.prompt) == each.prompt_tokens for each in requests)
    assert requests == datasets.random_requests(300, 100, 20, 0.5, 3)
    assert requests != datasets.random_requests(300, 100, 20, 0.5, 4)


def test_ids_stay_within_a_small_vocabulary() -> None:
    low, high = datasets.fit_range(datasets.TOKEN_RANGE, 259)
    assert 0 < low < high == 259
    ids = datasets.random_ids(0, 1000, (low, high))
    assert low <= min(ids) and max(ids) < 259


def test_a_custom_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "one two", "output_tokens": 5}, {"prompt": [7, 8, 9], "output_tokens": 6}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    requests = datasets.custom_requests(str(path), 3, None, 0, shuffle=False)
    assert [each.prompt for each in requests] == ["one two", [7, 8, 9], "one two"]
    assert [each.output_tokens for each in requests] == [5, 6, 5]
    assert [each.prompt_tokens for each in requests] == [0, 3, 0]
    assert {each.output_tokens for each in datasets.custom_requests(str(path), 2, 9, 0, False)} == {9}
    orders = {str(datasets.custom_requests(str(path), 2, 9, seed, True)) for seed in range(8)}
    assert len(orders) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1"),
        ('{"text": "x"}', '"prompt" must be'),
        ('{"prompt": [1, "x"]}', '"prompt" must be'),
        ('{"prompt": "x"}', "custom-output-len"),
        ("", "no usable prompt"),
    ],
)
def test_a_custom_file_that_cannot_work(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=message):
        datasets.custom_requests(str(path), 1, None, 0, False)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.jsonl"):
        datasets.custom_requests(str(tmp_path / "nothing.jsonl"), 1, 1, 0, False)


def test_sharegpt_takes_the_first_two_turns(tmp_path: Path) -> None:
    def talk(*turns: str) -> dict[str, object]:
        return {"conversations": [{"from": "human", "value": turn} for turn in turns]}

    path = tmp_path / "talks.json"
    talks = [talk("a b c d", "e f g h i", "unused"), talk("alone " * 9), talk("a", "b c d e"), {}]
    path.write_text(json.dumps(talks))
    (request,) = datasets.sharegpt_requests(str(path), 1, None, 0, False, Words())
    assert (request.prompt, request.prompt_tokens, request.output_tokens) == ("a b c d", 4, 5)
    (request,) = datasets.sharegpt_requests(str(path), 1, 2, 0, False, Words())
    assert request.output_tokens == 2


def test_ids_become_text() -> None:
    requests = [datasets.Request([1, 2], 2, 3), datasets.Request("text", 0, 3)]
    assert [each.prompt for each in datasets.as_text(requests, Words())] == ["1 2", "text"]
