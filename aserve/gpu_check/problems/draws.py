"""Penalties and drawn tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from aserve.gpu_check.problems.base import (
    Buffers,
    Check,
    Cost,
    Operation,
    Peer,
    Problem,
    Want,
    dtype_of,
    poisoned,
    random_in,
    rounded,
)

_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Logits:
    """rows of ``size`` logits. seen: most tokens that a row's penalties concern."""

    rows: int
    size: int
    seen: int = 0

    def __str__(self) -> str:
        return f"{self.rows}x{self.size}" + (f" seen{self.seen}" if self.seen else "")


def make_penalties(check: Check, seed: int, device: str, changed: bool) -> Problem:
    shape: Logits = check.shape
    dtype = dtype_of(check.dtype)
    random = torch.Generator().manual_seed(seed)
    logits = random_in((shape.rows, shape.size), dtype, random) * 3
    lengths = [shape.seen * (row % 3) // 2 for row in range(shape.rows)]
    ids = [torch.randperm(shape.size, generator=random)[:length] for length in lengths]
    counts = [torch.randint(0, 4, (length,), generator=random, dtype=torch.int32) for length in lengths]
    rates = torch.rand(3, shape.rows, generator=random)
    buffers = {
        "logits": logits,
        "starts": torch.tensor([0, *lengths]).cumsum(0),
        "ids": torch.cat(ids),
        "counts": torch.cat(counts),
        "repetition": rates[0] + 0.5,
        "frequency": rates[1] * 2 - 0.5,
        "presence": rates[2] * 2 - 0.5,
    }
    names = tuple(buffers)
    buffers = {name: each.contiguous().to(device) for name, each in buffers.items()}

    def expected() -> dict[str, Want]:
        b = {name: each.cpu() for name, each in buffers.items()}
        wide = b["logits"].double().clone()
        for row in range(shape.rows):
            at = slice(int(b["starts"][row]), int(b["starts"][row + 1]))
            place, count = b["ids"][at], b["counts"][at].double()
            picked, factor = wide[row, place], b["repetition"][row].double()
            picked = torch.where(picked > 0, picked / factor, picked * factor)
            wide[row, place] = (
                picked - b["frequency"][row].double() * count - b["presence"][row].double() * (count > 0)
            )
        return {"logits": rounded(wide.to(device), dtype, 4e-6)}

    return Problem(buffers, ("logits",), lambda b: tuple(b[name] for name in names), expected, {})


def _scramble(z: int) -> int:
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _WORD
    return z ^ z >> 31


def noise(seed: int, position: int, size: int) -> torch.Tensor:
    """Gumbel noise of every token, float64 ``[size]``: SplitMix64 of seed, position and token."""
    stream = _scramble((_scramble(seed & _WORD) + position) & _WORD)
    with np.errstate(over="ignore"):
        golden = np.uint64(0x9E3779B97F4A7C15)
        z = np.uint64(stream) + np.arange(1, size + 1, dtype=np.uint64) * golden
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    uniform = ((z >> np.uint64(41)).astype(np.float64) + 0.5) * 2.0**-23
    return torch.from_numpy(-np.log(-np.log(uniform)))


def make_sample(check: Check, seed: int, device: str, changed: bool) -> Problem:
    shape: Logits = check.shape
    dtype = dtype_of(check.dtype)
    random = torch.Generator().manual_seed(seed)
    logits = random_in((shape.rows, shape.size), dtype, random) * 3
    if shape.rows > 2 and shape.size > 2:
        logits[2, 1::2] = -math.inf
    temperature = torch.rand(shape.rows, generator=random) * 2 + 0.3
    temperature[1::3] = 0.0
    buffers = {
        "logits": logits,
        "temperature": temperature,
        "seeds": torch.randint(-(1 << 62), 1 << 62, (shape.rows,), generator=random),
        "positions": torch.randint(0, 100000, (shape.rows,), generator=random),
        "token": poisoned((shape.rows,), torch.int64, "cpu"),
        "logprob": poisoned((shape.rows,), torch.float32, "cpu"),
    }
    names = tuple(buffers)
    buffers = {name: each.contiguous().to(device) for name, each in buffers.items()}

    def expected() -> dict[str, Want]:
        b = {name: each.cpu() for name, each in buffers.items()}
        tokens, logprobs = [], []
        for row in range(shape.rows):
            heat = float(b["temperature"][row])
            wide = b["logits"][row].double() / (heat or 1.0)
            keys = wide
            if heat:
                keys = wide + noise(int(b["seeds"][row]), int(b["positions"][row]), shape.size)
            token = int((keys == keys.max()).int().argmax())
            tokens.append(token)
            logprobs.append(float(wide.log_softmax(-1)[token]))
        return {
            "token": Want(torch.tensor(tokens, device=device)),
            "logprob": Want(torch.tensor(logprobs, dtype=torch.float64, device=device), 1e-5, 1e-5),
        }

    def library(b: Buffers) -> Peer:
        heat = b["temperature"].masked_fill(b["temperature"] == 0, 1.0).unsqueeze(1)

        def call() -> None:
            weights = (b["logits"].float() / heat).softmax(-1)
            weights.div_(torch.empty_like(weights).exponential_()).argmax(-1)

        return call

    return Problem(
        buffers,
        ("token", "logprob"),
        lambda b: tuple(b[name] for name in names),
        expected,
        {"torch": library},
    )


def _penalty_cost(check: Check) -> Cost:
    shape: Logits = check.shape
    touched = sum(shape.seen * (row % 3) // 2 for row in range(shape.rows))
    return Cost(touched * (2 * dtype_of(check.dtype).itemsize + 12))


def _sample_cost(check: Check) -> Cost:
    shape: Logits = check.shape
    return Cost(shape.rows * shape.size * dtype_of(check.dtype).itemsize)


PENALTIES = Operation(make_penalties, _penalty_cost)
SAMPLE = Operation(make_sample, _sample_cost)
