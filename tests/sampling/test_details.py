"""Log-probabilities that were asked for: of drawn tokens and of prompt tokens."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aserve.messages.params import SamplingParams
from aserve.messages.step import SampleLogprobs
from tests.sampling import oracle
from tests.sampling.harness import distribution, entry, sample, state_of
from tests.sampling.oracle import Case, cases

VOCAB = 50


def greedy(logprobs: int | None, **options: object) -> Case:
    return Case(SamplingParams(temperature=0, logprobs=logprobs, **options), 0, [1], [])  # type: ignore[arg-type]


def details(case: Case, row: list[float] | np.ndarray) -> SampleLogprobs:
    sampled = sample([case], np.asarray(row, dtype=np.float32)[None])
    found = sampled.details[0]
    assert found.logprob == float(sampled.logprobs[0])
    return found


def test_only_who_asks_gets_them() -> None:
    logits = np.random.default_rng(0).normal(size=(4, VOCAB)).astype(np.float32)
    sampled = sample([greedy(None), greedy(2), greedy(0), greedy(7)], logits)
    assert {i: len(found.top_ids) for i, found in sampled.details.items()} == {1: 2, 2: 0, 3: 7}
    exact = [oracle.log_softmax(row.astype(np.float64)) for row in logits]
    np.testing.assert_allclose(sampled.logprobs.numpy(), [row.max() for row in exact], rtol=1e-6)
    for i, found in sampled.details.items():
        assert found.rank == 1
        order = np.argsort(-exact[i])[: len(found.top_ids)]
        assert found.top_ids == order.tolist()
        np.testing.assert_allclose(found.top_logprobs, exact[i][order], rtol=1e-6)


def test_rank_counts_strictly_likelier_tokens() -> None:
    bias = {3: -1.0}
    row = [1.0, 2.0, 2.0, 2.0, 0.0]
    state = state_of([Case(SamplingParams(logprobs=1, logit_bias=bias), 0, [1], [])], 5)
    seen = {}
    for _ in range(60):
        sampled = state.sample(torch.tensor([row]), [0], [0])
        seen[int(sampled.token_ids[0])] = sampled.details[0].rank
    assert seen == {0: 3, 1: 1, 2: 1, 3: 3, 4: 5}


def test_equals_are_listed_by_id_whatever_the_neighbours_ask_for() -> None:
    row = [0.0, 5.0, 3.0, 5.0, 3.0, 3.0, 3.0]
    for count, ids in ((1, [1]), (2, [1, 3]), (3, [1, 3, 2]), (5, [1, 3, 2, 4, 5])):
        assert details(greedy(count), row).top_ids == ids
        together = sample([greedy(count), greedy(6)], np.array([row, row], dtype=np.float32))
        assert together.details[0].top_ids == ids
    big = np.zeros(3000)
    big[2999] = 1.0
    assert details(greedy(4), big).top_ids == [2999, 0, 1, 2]


def test_truncated_tokens_are_listed_as_impossible() -> None:
    case = Case(SamplingParams(top_k=2, logprobs=4), 0, [1], [])
    found = details(case, [1.0, 4.0, 2.0, 3.0, 0.0])
    assert found.top_ids == [1, 3, 0, 2]
    assert found.top_logprobs[2:] == [-math.inf, -math.inf]
    np.testing.assert_allclose(np.exp(found.top_logprobs[:2]).sum(), 1.0, rtol=1e-6)


def test_more_than_the_vocabulary_gives_all_of_it() -> None:
    assert details(greedy(20), [1.0, 3.0, 2.0]).top_ids == [1, 2, 0]


def test_they_come_after_bias_and_penalties() -> None:
    case = Case(SamplingParams(temperature=0, logprobs=3, logit_bias={0: 5}, presence_penalty=2), 0, [1], [2])
    found = details(case, [0.0, 4.0, 6.0])
    assert found.top_ids == [0, 1, 2]
    np.testing.assert_allclose(found.top_logprobs, oracle.log_softmax(np.array([5.0, 4.0, 4.0])), rtol=1e-6)


@given(cases(VOCAB), oracle.logits(VOCAB, 5), st.sampled_from([0, 3, VOCAB]), st.data())
@settings(max_examples=100, deadline=None)
def test_prompt_tokens(case: Case, logits: np.ndarray, top: int, data: st.DataObject) -> None:
    """Temperature and truncation apply; bias, processors, min_tokens and penalties do not."""
    case.params.prompt_logprobs = top
    tokens = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=5, max_size=5))
    state = state_of([case], VOCAB)
    found = state.prompt_logprobs(torch.from_numpy(logits.copy()), torch.tensor(tokens), 0)
    assert len(found) == 5
    neutral = SamplingParams(
        temperature=case.params.temperature,
        top_k=case.params.top_k,
        top_p=case.params.top_p,
        min_p=case.params.min_p,
    )
    for row, token, each in zip(logits, tokens, found, strict=True):
        wanted = oracle.expected(row, Case(neutral, 0, [1], []))
        if (wanted.sure == wanted.possible).all():
            exact = oracle.log_softmax(np.where(wanted.sure, wanted.scores.astype(np.float64), -np.inf))
            np.testing.assert_allclose(each.logprob, exact[token], rtol=2e-6, atol=5e-6)
        assert len(each.top_ids) == top
        if top == VOCAB:
            shown = distribution(each)
            kept = np.isfinite(shown)
            assert not (wanted.sure & ~kept).any() and not (kept & ~wanted.possible).any()
            assert each.logprob == shown[token]
            assert each.rank == 1 + int((shown > shown[token]).sum())
        assert each.top_logprobs == sorted(each.top_logprobs, reverse=True)
    again = [
        state.prompt_logprobs(torch.from_numpy(logits[i : i + 1].copy()), torch.tensor(tokens[i : i + 1]), 0)
        for i in range(5)
    ]
    assert [one for (one,) in again] == found


def test_prompt_logprobs_do_not_count_as_output() -> None:
    case = Case(SamplingParams(prompt_logprobs=1, logprobs=VOCAB, frequency_penalty=2), 5, [1, 2], [])
    logits = np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32)
    state, fresh = state_of([case], VOCAB), state_of([case], VOCAB)
    state.prompt_logprobs(torch.from_numpy(logits.copy()), torch.tensor([1, 2, 3]), 0)
    left = state.sample(torch.from_numpy(logits[:1].copy()), [0], [0])
    right = fresh.sample(torch.from_numpy(logits[:1].copy()), [0], [0])
    assert entry(left, 0) == entry(right, 0)
