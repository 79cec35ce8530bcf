"""Top-k, top-p and min-p on scores whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aserve.sampling import truncation
from tests.sampling import oracle

NONE = -np.inf


def kept(scores: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    """Tokens of one row that survive; 0 is no top-k."""
    row = np.asarray(scores, dtype=np.float32)[None]
    work = torch.from_numpy(row.copy())
    limit = np.array([top_k or row.shape[1]])
    truncation.truncate(work, limit, np.array([top_p]), np.array([min_p]))
    left = work[0].numpy()
    assert ((left == row[0]) | (left == NONE)).all()
    return np.flatnonzero(left > NONE).tolist()


PROBS = np.log(np.array([0.1, 0.4, 0.05, 0.2, 0.25]))


@pytest.mark.parametrize(("k", "tokens"), [(1, [1]), (2, [1, 4]), (3, [1, 3, 4]), (4, [0, 1, 3, 4])])
def test_top_k(k: int, tokens: list[int]) -> None:
    assert kept(PROBS, top_k=k) == tokens


def test_top_k_keeps_ties_with_the_kth() -> None:
    assert kept([1, 2, 1, 3, 1, 0], top_k=3) == [0, 1, 2, 3, 4]
    assert kept([1, 1, 1, 1], top_k=1) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("p", "tokens"),
    [
        (1e-9, [1]),
        (0.39, [1]),
        (0.41, [1, 4]),
        (0.64, [1, 4]),
        (0.66, [1, 3, 4]),
        (0.86, [0, 1, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_is_the_smallest_set_that_reaches_it(p: float, tokens: list[int]) -> None:
    assert kept(PROBS, top_p=p) == tokens


def test_top_p_reached_exactly_needs_no_more() -> None:
    assert kept([0.0, 0.0], top_p=0.5) == [0]
    assert kept([0.0] * 8, top_p=0.25) == [0, 1]


def test_of_equals_top_p_keeps_the_lower_ids() -> None:
    assert kept([5, 1, 5, 1, 1], top_p=0.6) == [0, 2]
    assert kept([1, 5, 1, 1, 1], top_p=0.999) == [0, 1, 2, 3, 4]
    assert kept([1, 1, 2, 1, 1, 1], top_p=0.6) == [0, 1, 2]  # e / (e + 5) = 0.35, and 0.13 each


def test_top_p_looks_at_what_top_k_left() -> None:
    # Of 0.4 and 0.25 alone, the first is already 0.62 of the mass.
    assert kept(PROBS, top_k=2, top_p=0.6) == [1]
    assert kept(PROBS, top_k=2, top_p=0.63) == [1, 4]
    assert kept([0, 0, 0, 0, -1], top_k=2, top_p=0.6) == [0, 1, 2]  # four are tied


@pytest.mark.parametrize(
    ("p", "tokens"),
    [(0.0, [0, 1, 2, 3, 4]), (0.13, [0, 1, 3, 4]), (0.49, [1, 3, 4]), (0.6, [1, 4]), (1.0, [1])],
)
def test_min_p(p: float, tokens: list[int]) -> None:
    assert kept(PROBS, min_p=p) == tokens


def test_min_p_of_one_keeps_every_likeliest() -> None:
    assert kept([3, 1, 3, 2], min_p=1.0) == [0, 2]


def test_all_three_at_once() -> None:
    assert kept(PROBS, top_k=4, top_p=0.9, min_p=0.3) == [1, 3, 4]


def test_ruled_out_tokens_stay_out() -> None:
    scores = [NONE, 1, NONE, 0]
    assert kept(scores, top_k=3) == kept(scores, top_p=0.999999) == kept(scores, min_p=0.01) == [1, 3]


def test_rows_have_their_own_limits() -> None:
    work = torch.from_numpy(np.stack([PROBS] * 4).astype(np.float32))
    truncation.truncate(
        work, np.array([5, 2, 5, 5]), np.array([1.0, 1.0, 0.5, 1.0]), np.array([0.0, 0.0, 0.0, 0.3])
    )
    assert [np.flatnonzero(row > NONE).tolist() for row in work.numpy()] == [
        [0, 1, 2, 3, 4],
        [1, 4],
        [1, 4],
        [1, 3, 4],
    ]


LIMITS = st.tuples(
    st.sampled_from([2500, 1, 40, 600, 1100, 2499]),
    st.sampled_from([1.0, 0.1, 0.6, 0.95, 1 - 1e-9]),
    st.sampled_from([0.0, 0.1]),
)


@given(oracle.logits(2500, 3), st.lists(LIMITS, min_size=3, max_size=3), st.integers(0, 2500))
@settings(max_examples=60, deadline=None)
def test_candidates_are_only_a_shortcut(scores: np.ndarray, limits: list, likeliest: int) -> None:
    """However many are looked at first, the result is that of sorting everything."""
    scores[0, :likeliest] += 2.0
    columns = [np.array(column) for column in zip(*limits, strict=True)]
    results = []
    for candidates in (1024, 16, 2500):
        work = torch.from_numpy(scores.copy())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(truncation, "_CANDIDATES", candidates)
            truncation.truncate(work, *columns)
        results.append(work.numpy())
    assert (results[0] == results[2]).all() and (results[1] == results[2]).all()
    for row, (k, p, q) in enumerate(limits):
        wanted = oracle.truncated(scores[row], k, p, q)
        left = results[0][row] > NONE
        assert not (wanted.sure & ~left).any() and not (left & ~wanted.possible).any()


def test_a_cut_in_the_far_tail_does_not_depend_on_the_neighbours() -> None:
    scores = np.random.default_rng(5).standard_normal((40, 2500)).astype(np.float32) * 4
    nearly_all = 1 - 1e-9
    alone = torch.from_numpy(scores.copy())
    truncation.truncate(alone, np.full(40, 2500), np.full(40, nearly_all), np.zeros(40))
    beside = torch.from_numpy(np.concatenate([scores, scores[:1]]))
    top_k = np.array([2500] * 40 + [1100])  # makes more candidates be looked at
    truncation.truncate(beside, top_k, np.array([nearly_all] * 40 + [1.0]), np.zeros(41))
    assert torch.equal(beside[:40], alone)


def test_both_the_shortcut_and_its_fallback_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    highest = truncation._highest

    def spy(scores: torch.Tensor, count: int) -> torch.Tensor:
        widths.append(count)
        return highest(scores, count)

    monkeypatch.setattr(truncation, "_highest", spy)
    peaked = np.arange(3000, 0, -1.0)
    assert kept(peaked, top_p=0.9) == [0, 1, 2] and widths == [1024]
    widths.clear()
    assert len(kept(np.zeros(3000), top_p=0.9)) == 2700 and widths == [1024, 3000]
    widths.clear()
    assert kept(peaked, top_k=2000) == list(range(2000)) and widths == [3000]
    widths.clear()
    assert len(kept(np.zeros(3000), top_k=5)) == 3000 and widths == [1024]
    widths.clear()
    assert len(kept(np.zeros(3000), top_k=5, top_p=0.5)) == 1500 and widths == [1024, 3000]
