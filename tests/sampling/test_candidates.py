"""Slots that report candidates, for beam search."""

from __future__ import annotations

import numpy as np
import torch

from aserve.messages.params import SamplingParams
from aserve.sampling.sampler import SamplerState
from tests.sampling.harness import CPU, entry, run

VOCAB, EOS = 50, 4
PROMPT = [7, 8]


def log_softmax(row: np.ndarray) -> np.ndarray:
    return torch.from_numpy(row.astype(np.float64)).log_softmax(-1).numpy()


def beams(**options: object) -> SamplingParams:
    return SamplingParams(use_beam_search=True, best_of=3, temperature=0, **options)


def test_edits_come_after_the_softmax_and_neighbours_do_not_matter() -> None:
    state = SamplerState(6, VOCAB, CPU)
    state.add(
        0, beams(repetition_penalty=1.5, min_tokens=3, logit_bias={9: 2.0}), 0, PROMPT, [9], EOS, None, 6
    )
    state.add(1, SamplingParams(temperature=0.7, top_k=5, logprobs=2), 5, PROMPT, [], EOS)
    state.add(2, beams(logprobs=10), 0, PROMPT, [], EOS, None, 6)
    state.add(3, SamplingParams(temperature=0), 0, PROMPT, [], EOS)
    logits = np.random.default_rng(1).normal(size=(4, VOCAB)).astype(np.float32) * 3
    together = run(state, logits, [0, 1, 2, 3], [0, 1, 2, 3])

    wanted = log_softmax(logits[0])
    wanted[9] += 2.0
    wanted[EOS] = -np.inf
    for token in {*PROMPT, 9}:
        wanted[token] *= 1.5 if wanted[token] <= 0 else 1 / 1.5
    order = np.argsort(-wanted)
    details = together.details[0]
    assert details.top_ids == order[:6].tolist()
    np.testing.assert_allclose(details.top_logprobs, wanted[order[:6]], atol=1e-5)
    assert together.token_ids[0] == order[0] and details.rank == 1

    plain = log_softmax(logits[2])
    assert together.details[2].top_ids == np.argsort(-plain)[:10].tolist()
    assert len(together.details[1].top_ids) == 2 and 3 not in together.details
    for slot in (0, 1, 2, 3):
        fresh = SamplerState(6, VOCAB, CPU)
        fresh.add(
            0, beams(repetition_penalty=1.5, min_tokens=3, logit_bias={9: 2.0}), 0, PROMPT, [9], EOS, None, 6
        )
        fresh.add(1, SamplingParams(temperature=0.7, top_k=5, logprobs=2), 5, PROMPT, [], EOS)
        fresh.add(2, beams(logprobs=10), 0, PROMPT, [], EOS, None, 6)
        fresh.add(3, SamplingParams(temperature=0), 0, PROMPT, [], EOS)
        alone = run(fresh, logits[slot : slot + 1], [0], [slot])
        assert entry(alone, 0) == entry(together, slot)


def test_chosen_tokens_are_what_is_counted() -> None:
    """After forks and choices a slot is as if it had been told of anew."""
    seen: list[list[int]] = []

    def processor(output: list[int], row: torch.Tensor) -> torch.Tensor:
        seen.append(list(output))
        return row

    params = beams(frequency_penalty=1.0, min_tokens=3, logits_processors=[processor])
    state, anew = SamplerState(4, VOCAB, CPU), SamplerState(4, VOCAB, CPU)
    logits = np.random.default_rng(2).normal(size=(4, VOCAB)).astype(np.float32)
    state.add(0, params, 0, PROMPT, [], EOS, None, 6)
    run(state, logits[:1], [0], [0])
    state.fork(1, 0, 1)
    state.choose(0, 2, 11)
    state.choose(1, 2, 12)
    run(state, logits[:2], [0, 1], [0, 1])
    state.fork(0, 1, 2)
    state.choose(0, 3, 13)
    state.choose(1, 3, 12)
    for slot, output in ((0, [12, 13]), (1, [12, 12])):
        anew.add(slot, params, 0, PROMPT, output, EOS, None, 6)
        assert entry(run(state, logits[2:3], [0], [slot]), 0) == entry(run(anew, logits[2:3], [0], [slot]), 0)
        assert seen[-1] == seen[-2] == output


def test_a_beam_that_reported_and_was_preempted_before_the_choice_counts_its_tokens() -> None:
    """Told anew, it is not sampled again: the choice alone says that it has one more token."""
    state = SamplerState(2, VOCAB, CPU)
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, EOS] = 9.0
    state.add(0, beams(min_tokens=3), 0, PROMPT, [5], EOS, None, 6)
    for position, masked in ((3, True), (4, False)):
        state.choose(0, position, 6)
        sampled = run(state, logits, [0], [0])
        assert (int(sampled.token_ids[0]) != EOS) is masked


def test_a_row_that_allows_nothing_fails_alone() -> None:
    state = SamplerState(2, VOCAB, CPU)
    state.add(0, beams(), 0, PROMPT, [], EOS, None, 6)
    state.add(1, beams(), 0, PROMPT, [], EOS, None, 6)
    logits = np.zeros((2, VOCAB), dtype=np.float32)
    logits[0] = np.nan
    sampled = run(state, logits, [0, 1], [0, 1])
    assert set(sampled.failed) == {0}
    assert sampled.details[1].top_ids == list(range(6))
