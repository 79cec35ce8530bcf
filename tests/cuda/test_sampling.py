"""Penalties and the draw of the CUDA sources, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from aserve.gpu_check.problems.draws import noise
from tests.cuda.emulator import CODES, Emulator, PenaltyArgs, SampleArgs, orders, ptr

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sample(
    emulator: Emulator,
    logits: torch.Tensor,
    temperature: list[float] | None = None,
    seeds: list[int] | None = None,
    positions: list[int] | None = None,
    parts: int = 3,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = logits.shape
    token, logprob = emulator.empty((rows,), torch.int64), emulator.empty((rows,), torch.float32)
    args = SampleArgs(
        logits=ptr(logits),
        temperature=ptr(None if temperature is None else emulator.put(torch.tensor(temperature))),
        seeds=ptr(None if seeds is None else emulator.put(torch.tensor(seeds))),
        positions=ptr(None if positions is None else emulator.put(torch.tensor(positions))),
        token=ptr(token),
        logprob=ptr(logprob),
        partial=ptr(emulator.empty((rows, parts, 6), torch.float32)),
        rows=rows,
        size=size,
        stride=logits.stride(0),
        parts=parts,
        dtype=CODES[logits.dtype],
    )
    emulator.call("sample", args)
    return token, logprob


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 5, 31, 300, 5003])
def test_greedy(emulator: Emulator, size: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 2 * size) * 3).to(dtype)
    logits[1] = 2.0
    logits[2, : size // 2] = -math.inf
    logits = emulator.put(logits)[:, :size]
    wide = logits.double()
    want = [row.index(True) for row in (wide == wide.amax(-1, keepdim=True)).tolist()]
    exact = wide.log_softmax(-1).gather(1, torch.tensor(want)[:, None])[:, 0]
    for (order, seed), parts in zip(orders(), (1, 3, 40), strict=True):
        emulator.order(order, seed)
        token, logprob = sample(emulator, logits, parts=parts)
        assert token.tolist() == want
        torch.testing.assert_close(logprob.double(), exact, atol=3e-6, rtol=3e-6)


def test_greedy_shows_nan(emulator: Emulator) -> None:
    logits = emulator.put(torch.zeros(2, 40))
    logits[0, 20] = math.nan
    token, logprob = sample(emulator, logits)
    assert logprob.isnan().tolist() == [True, False]
    logits[:] = math.nan
    token, logprob = sample(emulator, logits)
    assert token.tolist() == [0, 0]
    assert logprob.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws(emulator: Emulator, dtype: torch.dtype) -> None:
    """The token whose logit and noise are the greatest; greedy rows between drawing ones."""
    size, temperature = 400, [0.7, 0.0, 1.0, 2.5]
    seeds, positions = [1, -5, 1 << 62, 77], [0, 3, 9, 100000]
    logits = emulator.put((torch.randn(4, size) * 3).to(dtype))
    logits[2, ::2] = -math.inf
    token, logprob = sample(emulator, logits, temperature, seeds, positions)
    for row, heat in enumerate(temperature):
        wide = logits[row].double() / (heat or 1.0)
        keys = wide + noise(seeds[row], positions[row], size) if heat else wide
        assert token[row] == keys.argmax()
        torch.testing.assert_close(
            logprob[row].double(), wide.log_softmax(-1)[token[row]], atol=1e-5, rtol=1e-5
        )
        alone = [[values[row]] for values in (temperature, seeds, positions)]
        assert sample(emulator, logits[row : row + 1], *alone, parts=7)[0] == token[row]


def test_draws_follow_the_distribution(emulator: Emulator) -> None:
    """Chi-squared over 1500 draws of 8 tokens, of seeds and of positions that count up."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -math.inf])
    expected = (logits.double() / 0.8).softmax(-1) * 1500
    rows = emulator.put(logits.expand(1500, 8))
    for seeds, positions in ((range(1500), [0] * 1500), ([7] * 1500, range(1500))):
        token, _ = sample(emulator, rows, [0.8] * 1500, list(seeds), list(positions), parts=1)
        counts = torch.bincount(token, minlength=8).double()
        assert counts[7] == 0
        chi = float(((counts - expected)[:7].pow(2) / expected[:7]).sum())
        assert chi < 22.5, chi  # the 0.1 % point at 6 degrees of freedom


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_penalties(emulator: Emulator, dtype: torch.dtype) -> None:
    size = 700
    logits = emulator.put((torch.randn(3, size) * 3).to(dtype))
    before = logits.clone()
    lengths = [500, 0, 3]
    ids = torch.cat([torch.randperm(size)[:length] for length in lengths])
    counts = torch.randint(0, 4, (503,), dtype=torch.int32)
    starts = torch.tensor([0, 500, 500, 503])
    rates = torch.tensor([[1.3, 2.0, 0.8], [0.5, 0.1, -0.2], [0.25, 0.3, 1.5]])
    held = [emulator.put(rate) for rate in rates]
    args = PenaltyArgs(
        logits=ptr(logits),
        starts=ptr(emulator.put(starts)),
        ids=ptr(emulator.put(ids)),
        counts=ptr(emulator.put(counts)),
        repetition=ptr(held[0]),
        frequency=ptr(held[1]),
        presence=ptr(held[2]),
        rows=3,
        size=size,
        stride=size,
        dtype=CODES[dtype],
    )
    emulator.call("penalties", args)
    want = before.double()
    for row in range(3):
        for at in range(int(starts[row]), int(starts[row + 1])):
            value, count = want[row, ids[at]], counts[at]
            value = value / rates[0, row] if value > 0 else value * rates[0, row]
            want[row, ids[at]] = value - rates[1, row] * count - (rates[2, row] if count > 0 else 0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), want, atol=4e-6, rtol=2e-6 if eps < 1e-6 else 0.51 * eps)
    untouched = torch.ones(3, size, dtype=torch.bool)
    untouched[torch.arange(3).repeat_interleave(torch.tensor(lengths)), ids] = False
    assert torch.equal(logits[untouched], before[untouched])
