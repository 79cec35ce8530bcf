"""Prompts to measure with."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aserve.errors import ConfigError

TOKEN_RANGE = (100, 40000)
"""Ids that random prompts are drawn from: above the special tokens, below a small vocabulary's end."""


@dataclass(frozen=True, slots=True)
class Request:
    """prompt: text or token ids. prompt_tokens: 0 where only the server can tell."""

    prompt: str | list[int]
    prompt_tokens: int
    output_tokens: int


def random_ids(index: int, length: int, token_range: tuple[int, int] = TOKEN_RANGE) -> list[int]:
    """Prompt number ``index`` of the fixed work: ids drawn by ``random.Random(index)``."""
    draw = random.Random(index)
    return [draw.randrange(*token_range) for _ in range(length)]


def fit_range(token_range: tuple[int, int], vocab_size: int) -> tuple[int, int]:
    """The range cut to a vocabulary."""
    low, high = token_range
    return min(low, vocab_size // 4), min(high, vocab_size)


def random_requests(
    count: int,
    input_len: int,
    output_len: int,
    range_ratio: float,
    seed: int,
    token_range: tuple[int, int] = TOKEN_RANGE,
) -> list[Request]:
    """Random token ids; lengths uniform in ``len * (1 - ratio) .. len * (1 + ratio)``, at least 1.

    With seed 0, request ``i`` has the ids of ``random.Random(i)``.
    """
    if not 0 <= range_ratio < 1:
        raise ConfigError(f"must be at least 0 and below 1, got {range_ratio}", param="random_range_ratio")
    lengths = random.Random(f"lengths {seed}")

    def length(middle: int) -> int:
        low, high = round(middle * (1 - range_ratio)), round(middle * (1 + range_ratio))
        return max(1, lengths.randint(low, high))

    sizes = [(length(input_len), length(output_len)) for _ in range(count)]
    return [
        Request(random_ids(seed * 1_000_000 + index, inputs, token_range), inputs, outputs)
        for index, (inputs, outputs) in enumerate(sizes)
    ]


def custom_requests(path: str, count: int, output_len: int | None, seed: int, shuffle: bool) -> list[Request]:
    """A JSON Lines file: ``prompt`` (text, or a list of token ids) and perhaps ``output_tokens`` per line.

    output_len: asked of every request; None takes the line's own, which it must then have.
    """
    requests = []
    for number, line in enumerate(_lines(path), 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}", param="dataset_path") from None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not prompt or not (isinstance(prompt, str) or all(type(each) is int for each in prompt)):
            raise ConfigError(
                f'{path}, line {number}: "prompt" must be text or a list of token ids', param="dataset_path"
            )
        wanted = output_len if output_len is not None else entry.get("output_tokens")
        if type(wanted) is not int or wanted < 1:
            raise ConfigError(
                f"{path}, line {number}: no output_tokens; set --custom-output-len", param="dataset_path"
            )
        requests.append(Request(prompt, len(prompt) if isinstance(prompt, list) else 0, wanted))
    return _take(requests, count, seed, shuffle, path)


def sharegpt_requests(
    path: str, count: int, output_len: int | None, seed: int, shuffle: bool, tokenizer: Any
) -> list[Request]:
    """The first two turns of each ShareGPT conversation: the prompt, and an answer whose length to ask for.

    Conversations with a turn of under 4 tokens, a prompt of over 1024 or a total of over 2048 are left
    out, as in the reference benchmark.
    """
    try:
        conversations = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}", param="dataset_path") from None
    requests = []
    for entry in conversations:
        turns = [turn["value"] for turn in entry.get("conversations", [])[:2]]
        if len(turns) < 2:
            continue
        inputs, answer = (len(tokenizer.encode(turn)) for turn in turns)
        outputs = answer if output_len is None else output_len
        if 4 <= inputs <= 1024 and outputs >= (4 if output_len is None else 1) and inputs + outputs <= 2048:
            requests.append(Request(turns[0], inputs, outputs))
    return _take(requests, count, seed, shuffle, path)


def as_text(requests: Iterable[Request], tokenizer: Any) -> list[Request]:
    """The same with token ids decoded, for endpoints that take text only."""
    return [
        request
        if isinstance(request.prompt, str)
        else Request(tokenizer.decode(request.prompt), request.prompt_tokens, request.output_tokens)
        for request in requests
    ]


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error}", param="dataset_path") from None
    return [line for line in text.splitlines() if line.strip()]


def _take(requests: Sequence[Request], count: int, seed: int, shuffle: bool, path: str) -> list[Request]:
    """``count`` of them, from the beginning again when there are fewer."""
    if not requests:
        raise ConfigError(f"{path} holds no usable prompt", param="dataset_path")
    order = list(requests)
    if shuffle:
        random.Random(seed).shuffle(order)
    return [order[index % len(order)] for index in range(count)]
