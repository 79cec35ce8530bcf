"""Requests to simulate: drawn from distributions, or read from a file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aserve.errors import ConfigError

INFINITE = math.inf
HASHED_TOKENS = 512
"""Tokens that one entry of ``hash_ids`` stands for."""

_IDS = list(range(1 << 16))
"""Ids that all prompts are cut from: slices share these integers instead of making their own."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts, parsed from text.

    ==========================  ==========================================================
    ``512``                     always 512
    ``uniform:100:900``         uniform over 100..900, both included
    ``lognormal:300:0.8``       log-normal with median 300 and sigma 0.8 of the logarithm
    ``lognormal:300:0.8:4096``  the same, longer ones cut to 4096
    ==========================  ==========================================================
    """

    kind: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str, name: str) -> Lengths:
        """ConfigError, naming the option ``name``, when the text is none of the forms above."""
        kind, *parts = str(text).split(":")
        if not parts:
            kind, parts = "fixed", [kind]
        try:
            values = tuple(float(part) for part in parts)
        except ValueError:
            values = ()
        counts = {"fixed": (1,), "uniform": (2,), "lognormal": (2, 3)}.get(kind, ())
        good = len(values) in counts and all(math.isfinite(value) for value in values) and values[0] >= 1
        if good and kind != "lognormal":
            good = all(value == int(value) for value in values) and values[-1] >= values[0]
        elif good:
            good = values[1] >= 0 and values[-1] >= (0 if len(values) == 2 else 1)
        if not good:
            raise ConfigError(
                f"expected N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:MAX], got {text!r}", param=name
            )
        return cls(kind, values)

    def draw(self, rng: random.Random) -> int:
        if self.kind == "fixed":
            return int(self.values[0])
        if self.kind == "uniform":
            return rng.randint(int(self.values[0]), int(self.values[1]))
        length = rng.lognormvariate(math.log(self.values[0]), self.values[1])
        most = self.values[2] if len(self.values) > 2 else math.inf
        return max(1, round(min(length, most)))


@dataclass(slots=True)
class Request:
    """One request of a trace.

    arrival: seconds from the start. prefix: which shared prefix its prompt begins with, None for no shared
    one. hashes: ids of its prompt's blocks of 512 tokens, equal ids for equal text. prompt: the ids
    themselves, where they are known; output: the ids it will generate, likewise.
    """

    index: int
    arrival: float
    input_tokens: int
    output_tokens: int
    priority: int = 0
    prefix: int | None = None
    prefix_tokens: int = 0
    hashes: tuple[int, ...] = ()
    prompt: tuple[int, ...] | None = None
    output: tuple[int, ...] | None = None

    def prompt_ids(self) -> list[int]:
        """Token ids that share a beginning exactly with the prompts they should share one with.

        Each piece (shared prefix, hashed block, the rest) starts with an id that belongs to it alone, so
        blocks hashed over everything before them differ from there on.
        """
        if self.prompt is not None:
            return list(self.prompt)
        ids: list[int] = []
        if self.prefix is not None:
            ids += _piece(_PREFIX + self.prefix, self.prefix_tokens)
        for each in self.hashes:
            ids += _piece(_HASHED + each % _KIND, min(HASHED_TOKENS, self.input_tokens - len(ids)))
        return ids + _piece(_UNIQUE + self.index, self.input_tokens - len(ids))


_KIND = 1 << 29
_PREFIX, _HASHED, _UNIQUE = _KIND, 2 * _KIND, 3 * _KIND


def _piece(first: int, length: int) -> list[int]:
    if length <= 0:
        return []
    if length <= len(_IDS):
        return [first, *_IDS[: length - 1]]
    return [first, *(_IDS * (length // len(_IDS) + 1))[: length - 1]]


@dataclass(frozen=True)
class TraceSpec:
    """Requests to draw.

    count: requests; None: as many as arrive within ``duration`` seconds. rate: per second; infinite sends
    all at once. burstiness: shape of the gamma distribution of the gaps; 1 is a Poisson process.
    prefix_tokens: shared tokens before the ``inputs`` of each prompt; num_prefixes: different ones, chosen
    uniformly. priorities: value -> weight.
    """

    inputs: Lengths
    outputs: Lengths
    count: int | None = 1000
    duration: float | None = None
    rate: float = INFINITE
    burstiness: float = 1.0
    prefix_tokens: int = 0
    num_prefixes: int = 1
    priorities: tuple[tuple[int, float], ...] = ((0, 1.0),)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count is None and (self.duration is None or self.rate == INFINITE):
            raise ConfigError(
                "without num_prompts, duration and request_rate must be given", param="duration"
            )
        for name, value in (("burstiness", self.burstiness), ("request_rate", self.rate)):
            if not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}", param=name)
        for name, number, least in (
            ("num_prompts", self.count, 1),
            ("prefix_len", self.prefix_tokens, 0),
            ("num_prefixes", self.num_prefixes, 1),
        ):
            if number is not None and number < least:
                raise ConfigError(f"{name} must be at least {least}, got {number}", param=name)
        if self.duration is not None and not self.duration > 0:
            raise ConfigError(f"duration must be above 0, got {self.duration}", param="duration")

    def requests(self) -> list[Request]:
        """The same requests for the same settings; other rates keep the lengths and scale the gaps.

        Gaps come from ``random.Random(f"arrivals {seed}")``, as ``aserve bench serve`` draws them.
        """
        arrivals = random.Random(f"arrivals {self.seed}")
        lengths = random.Random(f"simulated lengths {self.seed}")
        choices = random.Random(f"simulated choices {self.seed}")
        values = [value for value, _ in self.priorities]
        weights = [weight for _, weight in self.priorities]
        limit = math.inf if self.duration is None else self.duration
        found: list[Request] = []
        now = 0.0
        while self.count is None or len(found) < self.count:
            if self.rate != INFINITE:
                now += arrivals.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness))
            if now > limit:
                break
            inputs, outputs = self.inputs.draw(lengths), self.outputs.draw(lengths)
            prefix = choices.randrange(self.num_prefixes) if self.prefix_tokens else None
            priority = values[0] if len(values) == 1 else choices.choices(values, weights)[0]
            found.append(
                Request(
                    len(found),
                    now,
                    inputs + self.prefix_tokens,
                    outputs,
                    priority,
                    prefix,
                    self.prefix_tokens,
                )
            )
        return found


def read_trace(path: str, rate: float | None = None, count: int | None = None) -> list[Request]:
    """Requests of a JSON Lines file, in order of arrival.

    Keys of a line: ``arrival`` (seconds) or ``timestamp`` (milliseconds); ``prompt`` (token ids) or
    ``prompt_tokens`` or ``input_length`` (a count); ``output_tokens`` or ``output_length`` (a count) or
    ``output`` (token ids); perhaps ``priority`` and ``hash_ids``. ``timestamp``, ``input_length``,
    ``output_length`` and ``hash_ids`` are the Mooncake trace format (one hash id per 512 prompt tokens).

    rate: stretches or squeezes the times so that this many requests a second arrive on average. count: only
    the first so many. ConfigError: no such file, or a line that is not as above.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", param="trace") from None
    requests = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                requests.append(_request(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"{path}, line {number}: {error}", param="trace") from None
    if not requests:
        raise ConfigError(f"{path} holds no request", param="trace")
    requests.sort(key=lambda request: request.arrival)
    requests = requests[:count]
    start = requests[0].arrival
    span = requests[-1].arrival - start
    scale = len(requests) / span / rate if rate not in (None, INFINITE) and span > 0 else 1.0
    for index, request in enumerate(requests):
        request.index = index
        request.arrival = 0.0 if rate == INFINITE else (request.arrival - start) * scale
    return requests


def _request(line: Any) -> Request:
    if not isinstance(line, dict):
        raise ValueError("expected an object")
    prompt = _ids(line.get("prompt"), "prompt")
    output = _ids(line.get("output"), "output")
    count = _reader(line)
    if "arrival" in line:
        arrival = float(line["arrival"])
    else:
        arrival = float(line.get("timestamp", 0)) / 1000
    if not 0 <= arrival < math.inf:
        raise ValueError(f"arrival must be 0 or more, got {arrival}")
    hashes = _ids(line.get("hash_ids"), "hash_ids") or ()
    return Request(
        0,
        arrival,
        len(prompt) if prompt else count("prompt_tokens", "input_length"),
        len(output) if output else count("output_tokens", "output_length"),
        int(line.get("priority", 0)),
        hashes=hashes,
        prompt=prompt,
        output=output,
    )


def _reader(line: dict[str, Any]) -> Callable[[str, str], int]:
    def count(name: str, other: str) -> int:
        value = line.get(name, line.get(other))
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} or {other} must be a count of at least 1, got {value!r}")
        return value

    return count


def _ids(value: Any, name: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        raise ValueError(f"{name} must be a list of ids")
    return tuple(value) or None
