"""Guided rows in the sampler: masks, ends, copies, histories, and failures that stay in their row."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from aserve.guided.base import GrammarError, Matcher
from aserve.messages.params import SamplingParams
from aserve.sampling.guided import GuidedRows
from aserve.sampling.sampler import SamplerState
from aserve.worker.contained import ContainedRows
from tests.guided.fakes import FixedOutput

VOCAB, EOS, TURN = 75, 3, 5
"""Not a whole number of words, and not of bytes."""


class Some(FixedOutput):
    """Allows the same tokens everywhere, and the end after ``length`` of them."""

    textless = frozenset((EOS, TURN))

    def __init__(self, allowed: list[int], length: int) -> None:
        super().__init__([])
        self.allowed, self.length = allowed, length

    def matcher(self) -> Matcher:
        return _SomeMatcher(self, [])


class _SomeMatcher(Matcher):
    def __init__(self, grammar: Some, seen: list[int]) -> None:
        self.grammar, self.seen = grammar, seen

    def fill(self, words: np.ndarray) -> bool:
        bits = np.zeros(96, dtype=np.uint8)
        bits[self.grammar.allowed] = 1
        words[:] = np.packbits(bits, bitorder="little").view(np.uint32)
        return len(self.seen) >= self.grammar.length

    def advance(self, token_id: int) -> None:
        if token_id not in self.grammar.allowed:
            raise GrammarError("not allowed")
        self.seen.append(token_id)

    def copy(self) -> Matcher:
        return _SomeMatcher(self.grammar, list(self.seen))


def state_of(*rows: tuple[SamplingParams, object]) -> SamplerState:
    state = SamplerState(8, VOCAB, torch.device("cpu"))
    for slot, (params, grammar) in enumerate(rows):
        state.add(slot, params, 7 + slot, [1], [], EOS, grammar)
    return state


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32) * 3)


GREEDY = SamplingParams(temperature=0)


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=2.0, seed=1), SamplingParams(logprobs=3)]
)
def test_only_allowed_tokens_are_drawn(params: SamplingParams) -> None:
    allowed = [0, 31, 32, 63, 64, 74]
    state = state_of((params, Some(allowed, 100)))
    for seed in range(30):
        assert int(state.sample(logits(1, seed), [0], [0]).token_ids[0]) in allowed


def test_the_likeliest_of_what_is_allowed_with_its_own_logprob() -> None:
    allowed = [2, 40, 74]
    given = logits(1)
    sampled = state_of((GREEDY, Some(allowed, 100))).sample(given.clone(), [0], [0])
    wanted = given[0].log_softmax(-1)[allowed]
    assert int(sampled.token_ids[0]) == allowed[int(wanted.argmax())]
    assert float(sampled.logprobs[0]) == pytest.approx(float(wanted.max()), abs=1e-5)


def test_plain_rows_are_untouched_bit_for_bit() -> None:
    plain = SamplingParams(temperature=0.8, seed=3)
    rows = [(GREEDY, None), (plain, None), (GREEDY, Some([1], 9)), (plain, Some([1, 2], 9))]
    given = logits(4)
    mixed = state_of(*rows).sample(given.clone(), [0, 1, 2, 3], [0, 1, 2, 3])
    for slot in range(4):
        alone = state_of(*rows).sample(given[slot : slot + 1].clone(), [0], [slot])
        assert int(alone.token_ids[0]) == int(mixed.token_ids[slot])
        assert float(alone.logprobs[0]) == float(mixed.logprobs[slot])


class _Telling(_SomeMatcher):
    """Knows without a mask, and says how often it made one."""

    masks = 0

    def fill(self, words: np.ndarray) -> bool:
        _Telling.masks += 1
        return super().fill(words)

    def accepts(self, token_id: int) -> bool:
        return token_id in self.grammar.allowed


class _Told(Some):
    def matcher(self) -> Matcher:
        return _Telling(self, [])


def test_likeliest_tokens_known_beforehand_are_only_replaced_where_they_must_be() -> None:
    """With the same bits as if they had not been known, and a mask for nobody whose token may stay."""
    allowed = [2, 40, 74]
    given = logits(4)
    given[0, 40], given[2, 74], given[3, EOS] = 50.0, 50.0, 50.0
    for kind, masks in ((Some, None), (_Told, 2)):
        rows = [(GREEDY, kind(allowed, 100)) for _ in range(4)]
        expected = state_of(*rows).sample(given.clone(), [0, 1, 2, 3], [0, 1, 2, 3])
        _Telling.masks = 0
        state = ContainedRows(state_of(*rows))
        ids, logprobs = given.argmax(-1).tolist(), given.log_softmax(-1).amax(-1).tolist()
        known = [float(each) for each in state_of(*[(GREEDY, None)] * 4).sample(
            given.clone(), [0, 1, 2, 3], [0, 1, 2, 3]).logprobs]  # fmt: skip
        assert known == pytest.approx(logprobs, abs=1e-4)
        failed, redrawn = state.take_likeliest([0, 1, 2, 3], ids, known, given.clone())
        assert redrawn and not failed
        assert ids == expected.token_ids.tolist() and known == expected.logprobs.tolist()
        assert ids[0] == 40 and ids[2] == 74
        assert masks is None or _Telling.masks == masks
        assert state.sampler._guided._guides[1].matcher.seen == [ids[1]]


def test_of_rows_known_beforehand_one_may_fail() -> None:
    rows = [(GREEDY, None), (GREEDY, Some([], 100)), (GREEDY, Some([2], 100))]
    state = ContainedRows(state_of(*rows))
    given = logits(3)
    ids, logprobs = given.argmax(-1).tolist(), given.log_softmax(-1).amax(-1).tolist()
    first = ids[0], logprobs[0]
    failed, _ = state.take_likeliest([0, 1, 2], ids, logprobs, given)
    assert list(failed) == [1] and "allows no token" in failed[1]
    assert (ids[0], logprobs[0]) == first and ids[2] == 2


def test_the_end_comes_where_it_may_and_the_end_of_a_turn_with_it() -> None:
    params = SamplingParams(temperature=0, stop_token_ids=[TURN, 9])
    given = torch.zeros(1, VOCAB)
    given[0, TURN], given[0, 9] = 9.0, 20.0
    state = state_of((params, Some([1], 1)))
    assert int(state.sample(given.clone(), [0], [0]).token_ids[0]) == 1  # neither may come yet
    assert int(state.sample(given.clone(), [0], [0]).token_ids[0]) == TURN  # 9 stands for text: never


@pytest.mark.parametrize("options", [{"min_tokens": 5}, {"ignore_eos": True}, {"logit_bias": {EOS: -100}}])
def test_after_the_end_only_ends(options: dict[str, object]) -> None:
    state = state_of((SamplingParams(temperature=0, **options), FixedOutput([8])))  # type: ignore[arg-type]
    drawn = [int(state.sample(logits(1, seed), [0], [0]).token_ids[0]) for seed in range(4)]
    assert drawn == [8, EOS, EOS, EOS]


def test_min_tokens_keeps_the_end_away_while_there_is_more_to_say() -> None:
    state = state_of((SamplingParams(temperature=0, min_tokens=4), Some([1], 0)))
    given = torch.zeros(1, VOCAB)
    given[0, EOS] = 9.0
    drawn = [int(state.sample(given.clone(), [0], [0]).token_ids[0]) for _ in range(5)]
    assert drawn == [1, 1, 1, 1, EOS]


def test_a_fork_goes_on_from_where_its_parent_is_and_alone() -> None:
    state = state_of((GREEDY, FixedOutput([4, 5, 6])))
    state.sample(logits(1), [0], [0])
    state.fork(1, 0, 99)
    both = [state.sample(logits(2, seed), [0, 1], [0, 1]).token_ids.tolist() for seed in range(3)]
    assert both == [[5, 5], [6, 6], [EOS, EOS]]


def test_a_recomputed_sequence_goes_on_after_its_output() -> None:
    state = state_of((GREEDY, FixedOutput([4, 5, 6])))
    state.add(0, GREEDY, 7, [1], [4, 5], EOS, FixedOutput([4, 5, 6]))
    assert int(state.sample(logits(1), [0], [0]).token_ids[0]) == 6
    state.add(0, GREEDY, 7, [1], [4, 5, 6, EOS], EOS, FixedOutput([4, 5, 6]))
    assert int(state.sample(logits(1), [0], [0]).token_ids[0]) == EOS


def test_a_slot_given_to_another_forgets_its_grammar() -> None:
    state = state_of((GREEDY, FixedOutput([4])))
    state.add(0, GREEDY, 7, [1], [], EOS)
    given = logits(1)
    assert int(state.sample(given.clone(), [0], [0]).token_ids[0]) == int(given.argmax())


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=1)])
def test_failures_stay_in_their_row(params: SamplingParams) -> None:
    rows = [
        (params, FixedOutput([4, 5], fails_at=0)),
        (params, FixedOutput([4, 5])),
        (params, Some([], 1)),  # allows nothing, not even the end
        (params, None),
    ]
    given = logits(4)
    sampled = state_of(*rows).sample(given.clone(), [0, 1, 2, 3], [0, 1, 2, 3])
    alone = state_of(*rows).sample(given[3:].clone(), [0], [3])
    assert set(sampled.failed) == {0, 2}
    assert "broke" in sampled.failed[0] and "no token" in sampled.failed[2]
    assert int(sampled.token_ids[1]) == 4
    assert int(sampled.token_ids[3]) == int(alone.token_ids[0])
    assert float(sampled.logprobs[3]) == float(alone.logprobs[0])


def test_logits_that_are_not_finite_still_fail_their_row() -> None:
    given = logits(1)
    given[0, 4] = float("nan")
    assert 0 in state_of((GREEDY, FixedOutput([4]))).sample(given, [0], [0]).failed


def test_a_row_that_cannot_be_matched_leaves_the_others_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(SamplingParams(temperature=1.5, seed=each), Some(list(range(40)), 100)) for each in range(3)]
    expected = state_of(*rows)
    wanted = [expected.sample(logits(3, seed), [0, 1, 2], [0, 1, 2]).token_ids.tolist() for seed in range(4)]

    real = GuidedRows.advance

    def advance(self: GuidedRows, slot: int, token: int) -> None:
        if slot == 1:
            raise RuntimeError("broken")
        real(self, slot, token)

    monkeypatch.setattr(GuidedRows, "advance", advance)
    state = ContainedRows(state_of(*rows))
    for seed in range(4):
        sampled = state.sample(partial(logits, 3, seed), [0, 1, 2], [0, 1, 2])
        assert list(sampled.failed) == [1]
        assert sampled.token_ids.tolist()[::2] == wanted[seed][::2]
