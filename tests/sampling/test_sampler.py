"""Whole rows against the oracle, over mixtures of parameters and of neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aserve.messages.params import SamplingParams
from aserve.sampling import sampler as sampler_module
from tests.sampling import oracle
from tests.sampling.harness import add, distribution, entry, run, sample, state_of
from tests.sampling.oracle import EOS, Case, cases

SMALL, MEDIUM = 50, 3000


def check(case: Case, row: np.ndarray, got: tuple) -> None:
    """``got`` is an ``entry`` with the log-probabilities of the whole vocabulary."""
    token, logprob, details, failed = got
    assert failed is None and details is not None
    wanted = oracle.expected(row, case)
    shown = distribution(details)
    kept = np.isfinite(shown)
    assert not (wanted.sure & ~kept).any() and not (kept & ~wanted.possible).any()
    exact = oracle.log_softmax(np.where(kept, wanted.scores.astype(np.float64), -np.inf))
    # A likely token's lane of torch's sum takes up V / 16 small terms, each rounded to its own size.
    slack = 5e-6 + len(row) / 16 * 2**-24
    np.testing.assert_allclose(shown[kept], exact[kept], rtol=2e-6, atol=slack)
    if case.params.temperature == 0.0:
        assert token == int(wanted.scores.argmax())
    else:
        probs = np.exp(exact)
        end = probs[: token + 1].sum()
        u = oracle.uniform(case.seed, len(case.output))
        assert kept[token] and end - probs[token] - 1e-5 <= u <= end + 1e-5
    assert logprob == details.logprob == shown[token]
    assert details.rank == 1 + int((shown > shown[token]).sum())
    assert details.top_ids == sorted(range(len(row)), key=lambda i: (-shown[i], i))


@st.composite
def batches(draw: st.DrawFn, vocab: int, most: int, logprobs: bool = True) -> tuple:
    """Cases, logits, and the row that each case samples from; rows may be shared or left out."""
    drawn = draw(st.lists(cases(vocab, logprobs), min_size=1, max_size=most))
    if draw(st.booleans()):
        rows = list(range(len(drawn)))
        count = len(drawn)
    else:
        count = draw(st.integers(1, most))
        rows = [draw(st.integers(0, count - 1)) for _ in drawn]
    return drawn, draw(oracle.logits(vocab, count)), rows


@given(batches(SMALL, 6))
@settings(max_examples=250, deadline=None)
def test_every_mixture_in_a_small_vocabulary(batch: tuple) -> None:
    drawn, logits, rows = batch
    sampled = sample(drawn, logits, rows)
    assert sampled.token_ids.dtype == torch.int64 and sampled.logprobs.dtype == torch.float32
    for i, (case, row) in enumerate(zip(drawn, rows, strict=True)):
        check(case, logits[row], entry(sampled, i))


@given(batches(MEDIUM, 4))
@settings(max_examples=60, deadline=None)
def test_every_mixture_beyond_the_shortcut_for_candidates(batch: tuple) -> None:
    drawn, logits, rows = batch
    sampled = sample(drawn, logits, rows)
    for i, (case, row) in enumerate(zip(drawn, rows, strict=True)):
        check(case, logits[row], entry(sampled, i))


@given(batches(SMALL, 6), st.sampled_from([None, 0, 1, 5]))
@settings(max_examples=100, deadline=None)
def test_a_row_alone_gives_the_same_bits(batch: tuple, top: int | None) -> None:
    drawn, logits, rows = batch
    for case in drawn[1:]:
        case.params.logprobs = top  # neighbours ask for other numbers of log-probabilities
    together = sample(drawn, logits, rows)
    for i, (case, row) in enumerate(zip(drawn, rows, strict=True)):
        alone = sample([case], logits[row : row + 1])
        assert entry(alone, 0) == entry(together, i)


@given(batches(MEDIUM, 5))
@settings(max_examples=25, deadline=None)
def test_a_row_alone_gives_the_same_bits_beyond_the_shortcut(batch: tuple) -> None:
    drawn, logits, rows = batch
    together = sample(drawn, logits, rows)
    for i, (case, row) in enumerate(zip(drawn, rows, strict=True)):
        assert entry(sample([case], logits[row : row + 1]), 0) == entry(together, i)


def test_a_row_alone_gives_the_same_bits_with_two_threads() -> None:
    """A reduction over one long row is shared among threads; one over many rows is not."""
    vocab, threads = 49152, torch.get_num_threads()
    kinds = [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.01}, {"presence_penalty": 1}]
    drawn = [
        Case(SamplingParams(logprobs=5, **kind), seed, [1], [3, 4]) for seed, kind in enumerate(kinds * 3)
    ]
    logits = np.random.default_rng(0).normal(size=(len(drawn), vocab)).astype(np.float32) * 3
    torch.set_num_threads(2)
    try:
        together = sample(drawn, logits)
        for i, case in enumerate(drawn):
            assert entry(sample([case], logits[i : i + 1]), 0) == entry(together, i)
    finally:
        torch.set_num_threads(threads)


@given(st.lists(cases(SMALL), min_size=1, max_size=3), st.integers(0, 6), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_a_preempted_sequence_goes_on_as_if_it_had_not_been(drawn: list[Case], when: int, seed: int) -> None:
    """The worker is told of it anew, in another slot, with what it had generated."""
    steps, count = 7, len(drawn)
    logits = np.random.default_rng(seed).normal(size=(steps, count, SMALL)).astype(np.float32)
    whole, broken = state_of(drawn, SMALL), state_of(drawn, SMALL)
    slots = list(range(count))
    outputs = [list(case.output) for case in drawn]
    for step in range(steps):
        if step == when:
            for i, case in enumerate(drawn):
                add(broken, count + i, Case(case.params, case.seed, case.prompt, outputs[i]))
            slots = [count + i for i in range(count)]
        left = run(whole, logits[step], list(range(count)), list(range(count)))
        right = run(broken, logits[step], list(range(count)), slots)
        for i, case in enumerate(drawn):
            assert entry(left, i) == entry(right, i)
            check(Case(case.params, case.seed, case.prompt, outputs[i]), logits[step, i], entry(left, i))
            outputs[i].append(entry(left, i)[0])


@given(cases(SMALL), st.integers(0, 4), st.integers(0, oracle.MASK), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_a_fork_is_a_copy_with_draws_of_its_own(case: Case, when: int, child_seed: int, seed: int) -> None:
    steps = 6
    logits = np.random.default_rng(seed).normal(size=(steps, 2, SMALL)).astype(np.float32)
    state, alone = state_of([case, case], SMALL), state_of([case], SMALL)
    add(state, 1, Case(SamplingParams(presence_penalty=1), 7, [9], [9]))  # to be overwritten whole
    outputs = [list(case.output), []]
    for step in range(steps):
        if step == when:
            state.fork(1, 0, child_seed)
            outputs[1] = list(outputs[0])
        slots = [0, 1] if step >= when else [0]
        sampled = run(state, logits[step], slots, slots)
        assert entry(sampled, 0) == entry(run(alone, logits[step], [0], [0]), 0)
        for slot in slots:
            own = Case(case.params, (case.seed, child_seed)[slot], case.prompt, outputs[slot])
            check(own, logits[step, slot], entry(sampled, slot))
            outputs[slot].append(entry(sampled, slot)[0])


def test_a_fork_of_an_unpenalised_sequence_forgets_the_penalties_of_its_slot() -> None:
    plain = Case(SamplingParams(temperature=0, logprobs=SMALL), 0, [1], [])
    state = state_of([plain, plain], SMALL)
    add(state, 1, Case(SamplingParams(temperature=0, frequency_penalty=2), 0, [1], [5, 5, 5]))
    state.fork(1, 0, 1)
    logits = np.zeros((2, SMALL), dtype=np.float32)
    logits[:, 5] = 1.0
    assert run(state, logits, [0, 1], [0, 1]).token_ids.tolist() == [5, 5]


def test_a_slot_given_away_keeps_nothing() -> None:
    used = Case(
        SamplingParams(
            temperature=0.5,
            top_k=2,
            min_tokens=9,
            repetition_penalty=2,
            logit_bias={4: 50},
            logits_processors=[oracle.favour_length],
        ),
        0,
        [1],
        [3],
    )
    fresh = Case(SamplingParams(temperature=0, logprobs=SMALL), 0, [1], [])
    logits = np.random.default_rng(0).normal(size=(1, SMALL)).astype(np.float32)
    logits[0, EOS] = 9.0
    state = state_of([used], SMALL)
    run(state, logits, [0], [0])
    add(state, 0, fresh)
    got = entry(run(state, logits, [0], [0]), 0)
    assert got[0] == EOS and not state._penalties._seen
    check(fresh, logits[0], got)


@pytest.mark.parametrize("extreme", [0.0, float(np.nextafter(1.0, 0.0))])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.99}, {"top_k": 9}, {"min_p": 1e-6}])
def test_tokens_of_no_probability_are_never_drawn(
    extreme: float, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "uniforms", lambda seeds, positions: np.full(len(seeds), extreme))
    rng = np.random.default_rng(3)
    for vocab in (7, SMALL, MEDIUM):
        logits = rng.normal(size=(8, vocab)).astype(np.float32)
        logits[rng.random(logits.shape) < 0.4] = -np.inf
        logits[:, 0], logits[:, -1] = -np.inf, -np.inf
        logits[:, 1], logits[:, -2] = -200.0, -200.0  # allowed, but less likely than a float32 can say
        logits[:, 3] = 1.0
        case = Case(SamplingParams(logprobs=vocab, **options), 0, [1], [])
        sampled = sample([case] * 8, logits)
        for i in range(8):
            token, logprob, details, _ = entry(sampled, i)
            probs = np.exp(distribution(details).astype(np.float32))
            possible = np.flatnonzero(probs > 0)
            assert token == possible[0 if extreme == 0.0 else -1] and logprob > -100


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 32000 draws: 2000 seeds, 16 positions each. The seeds are fixed, so it is no gamble."""
    probs = np.array([0.3, 0.0, 0.2, 0.02, 0.18, 0.1, 0.15, 0.05])
    with np.errstate(divide="ignore"):
        logits = np.log(probs).astype(np.float32)[None]
    count, steps = 2000, 16
    state = state_of([Case(SamplingParams(), seed, [1], []) for seed in range(count)], 8)
    drawn = np.stack(
        [run(state, logits, [0] * count, list(range(count))).token_ids.numpy() for _ in range(steps)]
    )
    allowed = probs > 0

    def chi_square(tokens: np.ndarray) -> float:
        seen = np.bincount(tokens.ravel(), minlength=8)
        assert seen[~allowed].sum() == 0
        wanted = probs * tokens.size
        return float((((seen - wanted) ** 2)[allowed] / wanted[allowed]).sum())

    assert chi_square(drawn) < 22.5  # 0.1% of 6 degrees of freedom
    for position in range(steps):
        assert chi_square(drawn[position]) < 30.0
    # Successive draws of one sequence are independent: pairs follow the product.
    pairs = np.bincount((drawn[:-1] * 8 + drawn[1:]).ravel(), minlength=64)
    wanted = np.outer(probs, probs).ravel() * drawn[1:].size
    both = wanted > 0
    assert float((((pairs - wanted) ** 2)[both] / wanted[both]).sum()) < 86.7  # 0.1% of 48


def test_hot_and_cold_temperatures() -> None:
    logits = np.array([[0.0, 1.0, -np.inf, 3.0]], dtype=np.float32)
    hot = entry(sample([Case(SamplingParams(temperature=1e300, logprobs=4), 1, [1], [])], logits), 0)
    np.testing.assert_allclose(
        distribution(hot[2]), [np.log(1 / 3)] * 2 + [-np.inf, np.log(1 / 3)], rtol=1e-5
    )
    cold = entry(sample([Case(SamplingParams(temperature=1e-5, logprobs=4), 1, [1], [])], logits), 0)
    assert cold[0] == 3 and cold[1] == 0.0


def test_a_forced_token_survives_a_low_temperature() -> None:
    """The quotient would be infinite in float32."""

    def force(output_ids: list[int], row: torch.Tensor) -> torch.Tensor:
        row[5] = 3e38
        return row

    forced = Case(SamplingParams(temperature=0.1, logits_processors=[force]), 1, [1], [])
    plain = Case(SamplingParams(temperature=0.1, logprobs=SMALL), 1, [1], [])
    logits = np.random.default_rng(0).normal(size=(2, SMALL)).astype(np.float32)
    sampled = sample([forced, plain], logits)
    assert not sampled.failed and entry(sampled, 0)[:2] == (5, 0.0)
    check(plain, logits[1], entry(sampled, 1))
