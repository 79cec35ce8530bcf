"""Running a sampler over cases."""

from __future__ import annotations

import numpy as np
import torch

from aserve.messages.step import SampleLogprobs
from aserve.sampling.sampler import Sampled, SamplerState
from tests.sampling.oracle import EOS, Case

CPU = torch.device("cpu")


def state_of(cases: list[Case], vocab: int, device: torch.device = CPU) -> SamplerState:
    """A sampler with ``cases[i]`` in slot ``i`` and as many slots free."""
    state = SamplerState(2 * len(cases), vocab, device)
    for slot, case in enumerate(cases):
        add(state, slot, case)
    return state


def add(state: SamplerState, slot: int, case: Case) -> None:
    state.add(slot, case.params, case.seed, list(case.prompt), list(case.output), EOS)


def run(state: SamplerState, logits: np.ndarray, rows: list[int], slots: list[int]) -> Sampled:
    return state.sample(torch.from_numpy(logits.copy()).to(state.device), rows, slots)


def sample(cases: list[Case], logits: np.ndarray, rows: list[int] | None = None) -> Sampled:
    """One step of a fresh sampler; case ``i`` takes row ``rows[i]``."""
    state = state_of(cases, logits.shape[1])
    rows = list(range(len(cases))) if rows is None else rows
    return run(state, logits, rows, list(range(len(cases))))


def entry(sampled: Sampled, at: int) -> tuple[int, float, SampleLogprobs | None, str | None]:
    """Everything that a step says about one sample."""
    return (
        int(sampled.token_ids[at]),
        float(sampled.logprobs[at]),
        sampled.details.get(at),
        sampled.failed.get(at),
    )


def distribution(details: SampleLogprobs) -> np.ndarray:
    """Log-probabilities by token, of details that list the whole vocabulary."""
    values = np.empty(len(details.top_ids), dtype=np.float64)
    values[details.top_ids] = details.top_logprobs
    return values
