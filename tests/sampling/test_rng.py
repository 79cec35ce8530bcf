"""The uniform numbers behind the draws."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aserve.sampling.rng import uniforms
from tests.sampling.oracle import MASK, uniform

SEEDS = st.integers(0, MASK)


@given(st.lists(st.tuples(SEEDS, st.integers(0, 2**31)), min_size=1, max_size=5))
def test_matches_the_generator_in_plain_integers(pairs: list[tuple[int, int]]) -> None:
    seeds, positions = zip(*pairs, strict=True)
    got = uniforms(np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.int64))
    assert got.dtype == np.float64
    assert got.tolist() == [uniform(*pair) for pair in pairs]


def test_matches_the_published_stream() -> None:
    """First outputs of SplitMix64 from seed 1234567, as its authors' C code prints them."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = uniforms(np.full(4, 1234567, dtype=np.uint64), np.arange(4))
    assert got.tolist() == [(value >> 11) / 2.0**53 for value in published]


def test_even_over_positions_and_over_neighbouring_seeds() -> None:
    count = 100_000
    along = uniforms(np.zeros(count, dtype=np.uint64), np.arange(count))
    across = uniforms(np.arange(count, dtype=np.uint64), np.zeros(count, dtype=np.int64))
    for drawn in (along, across):
        assert drawn.min() >= 0.0 and drawn.max() < 1.0 and len(np.unique(drawn)) == count
        seen = np.bincount((drawn * 100).astype(int), minlength=100)
        assert ((seen - 1000.0) ** 2 / 1000.0).sum() < 148.3  # 0.1% of 99 degrees of freedom
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.012
