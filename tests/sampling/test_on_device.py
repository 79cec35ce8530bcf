"""What is drawn without the host is what the common sampler draws."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from aserve import ops
from aserve.messages.params import SamplingParams
from aserve.ops import reference
from aserve.sampling import on_device
from aserve.sampling.on_device import Draw, is_free, truncated
from aserve.sampling.sampler import SamplerState
from aserve.sampling.truncation import truncate

VOCABULARY = 97


class Arrays:
    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def add(self, array: np.ndarray) -> int:
        self._tensors.append(torch.from_numpy(np.array(array)))
        return len(self._tensors) - 1

    def __getitem__(self, number: int) -> torch.Tensor:
        return self._tensors[number]


def some_params(rng: random.Random) -> SamplingParams:
    options: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.0, 0.3, 1.0, 2.5]),
        "seed": rng.getrandbits(40),
    }
    if rng.random() < 0.5:
        options |= {"top_k": rng.choice([-1, 1, 3, 20]), "top_p": rng.choice([1.0, 0.9, 0.2])}
    if rng.random() < 0.3:
        options["min_p"] = rng.choice([0.01, 0.3])
    if options["temperature"] == 0.0:
        options |= {"top_k": -1, "top_p": 1.0, "min_p": 0.0}
    if rng.random() < 0.4:
        options |= {
            "repetition_penalty": rng.choice([1.0, 1.5, 0.7]),
            "frequency_penalty": rng.choice([0.0, 0.8]),
            "presence_penalty": rng.choice([0.0, -0.5, 0.9]),
        }
    if rng.random() < 0.4:
        options["logprobs"] = rng.choice([0, 1, 5])
    if rng.random() < 0.3:
        options |= {"min_tokens": rng.randint(1, 6), "stop_token_ids": [rng.randrange(VOCABULARY)]}
    return SamplingParams(**options)


def some_logits(rng: random.Random, rows: int, coarse: bool) -> torch.Tensor:
    torch.manual_seed(rng.getrandbits(30))
    logits = torch.randn(rows, VOCABULARY) * 4
    # Coarse ones tie, at the border of top-k and top-p too.
    return logits.round() if coarse else logits


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("at_once", "by_kernel"), [(on_device._AT_ONCE, False), (3 * VOCABULARY, False), (3 * VOCABULARY, True)]
)
def test_the_same_draws(seed: int, at_once: int, by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """by_kernel: what a kernel draws in one pass is left to it, as on a GPU whose kernels are verified."""
    monkeypatch.setattr(on_device, "_AT_ONCE", at_once)
    monkeypatch.setattr(ops, "samples", lambda device: by_kernel)
    rng = random.Random(seed)
    slots = rng.sample(range(40), 11)
    ours, theirs = (SamplerState(40, VOCABULARY, torch.device("cpu")) for _ in range(2))
    tokens = torch.zeros(40, 64, dtype=torch.int64)
    lengths = {}
    for slot in slots:
        params = some_params(rng)
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20))]
        output = [rng.randrange(VOCABULARY) for _ in range(rng.choice([0, 0, 7]))]
        for state in (ours, theirs):
            state.add(slot, params, params.seed or 0, prompt, output, 2)
        lengths[slot] = len(prompt) + len(output)
        tokens[slot, : lengths[slot]] = torch.tensor(prompt + output)
    assert is_free(ours, slots).all()
    for step in range(6):
        logits = some_logits(rng, len(slots), coarse=step % 2 == 1)
        if step == 4:
            logits[3] = float("nan")
            logits[5] = float("-inf")
        arrays = Arrays()
        draw = Draw(ours, slots, arrays, torch.device("cpu"))
        before = logits.clone()
        drawn = draw.run(logits, lambda index, longest: tokens[index, :longest])
        assert torch.equal(logits.nan_to_num(), before.nan_to_num())
        expected = theirs.sample(logits.clone(), list(range(len(slots))), slots)
        failed = draw.failed(drawn.logprobs.numpy(), drawn.highest.numpy())
        assert failed == expected.failed
        fine = [i for i in range(len(slots)) if i not in failed]
        assert drawn.token_ids[fine].tolist() == expected.token_ids[fine].tolist()
        assert drawn.logprobs[fine].tolist() == pytest.approx(expected.logprobs[fine].tolist(), abs=1e-5)
        details = {}
        if drawn.ranks is not None:
            tops = None if drawn.tops is None else (drawn.tops[0].numpy(), drawn.tops[1].numpy())
            details = draw.details(drawn.logprobs.numpy(), drawn.ranks.numpy(), tops)
        assert details.keys() == expected.details.keys()
        for i in set(details) - set(failed):
            assert details[i].rank == expected.details[i].rank
            assert details[i].top_ids == expected.details[i].top_ids
            assert details[i].top_logprobs == pytest.approx(expected.details[i].top_logprobs, abs=1e-5)
        for i, slot in enumerate(slots):
            tokens[slot, lengths[slot]] = expected.token_ids[i]
            lengths[slot] += 1


@pytest.mark.parametrize("coarse", [False, True])
def test_truncation_by_sorting_keeps_what_truncation_keeps(coarse: bool) -> None:
    rng = random.Random(4)
    rows = 200
    scores = some_logits(rng, rows, coarse)
    top_k = np.array([rng.choice([1, 2, 5, 40, VOCABULARY]) for _ in range(rows)])
    top_p = np.array([rng.choice([1.0, 0.999, 0.5, 1e-9]) for _ in range(rows)])
    min_p = np.array([rng.choice([0.0, 0.02, 1.0]) for _ in range(rows)])
    with np.errstate(divide="ignore"):
        least = torch.from_numpy(np.log(min_p).astype(np.float32))
    found = truncated(scores, torch.from_numpy(top_k), torch.from_numpy(top_p), least)
    truncate(scores, top_k, top_p, min_p)
    assert torch.equal(found, scores)


@pytest.mark.parametrize(
    "options", [{"logit_bias": {4: 1.0}}, {"logits_processors": [lambda output, row: row]}]
)
def test_what_needs_the_host_is_left_to_it(options: dict[str, Any]) -> None:
    state = SamplerState(2, VOCABULARY, torch.device("cpu"))
    state.add(0, SamplingParams(**options), 0, [1], [], None)
    state.add(1, SamplingParams(), 0, [1], [], None, candidates=4)
    assert not is_free(state, [0, 1]).any()


@pytest.mark.parametrize("count", [1, 4])
def test_rows_of_one_kind_are_drawn_from_the_logits_themselves(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel for the whole step: the likeliest tokens, which nobody wants, are not looked for."""
    monkeypatch.setattr(ops, "samples", lambda device: True)
    monkeypatch.setattr(ops, "greedy_logprob", None)
    state, slots = SamplerState(8, VOCABULARY, torch.device("cpu")), list(range(count))
    for slot in slots:
        state.add(slot, SamplingParams(temperature=0.7), 5 + slot, [1], [], None)
    logits = some_logits(random.Random(1), count, coarse=False)
    logits[0] *= 1e37
    state.temperature[0] = 1e-3
    drawn = Draw(state, slots, Arrays(), torch.device("cpu")).run(logits, lambda *given: torch.empty(0))
    temperature = torch.tensor([0.0] + [0.7] * (count - 1))
    seeds = torch.arange(5, 5 + count)
    token_ids, logprobs = reference.sample(logits, temperature, seeds, torch.zeros_like(seeds))
    assert drawn.token_ids.tolist() == token_ids.tolist()
    torch.testing.assert_close(drawn.logprobs, logprobs)
    assert torch.equal(drawn.highest, logits.amax(-1))
