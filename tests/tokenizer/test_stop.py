"""Stop strings against an oracle that always looks at the whole text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aserve.tokenizer.stop import StopChecker


class Oracle:
    """The same by keeping everything and searching it anew."""

    def __init__(self, stop: list[str], include: bool) -> None:
        self.stop, self.include = stop, include
        self.whole = ""
        self.found: str | None = None
        self.held = 0 if include else max(map(len, stop)) - 1

    def feed(self, delta: str, searching: bool) -> str | None:
        before = len(self.whole)
        self.whole += delta
        if searching:
            for word in self.stop:  # list order, not order in the text
                for at in range(len(self.whole) - len(word) + 1):
                    if at + len(word) > before and self.whole.startswith(word, at):
                        self.whole = self.whole[: at + len(word) if self.include else at]
                        self.found = word
                        return word
        return None

    @property
    def text(self) -> str:
        """What may be shown."""
        if self.found is not None:
            return self.whole
        return self.whole[: max(0, len(self.whole) - self.held)]


WORDS = st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4)
DELTAS = st.lists(st.tuples(st.text("ab\nc", max_size=6), st.booleans()), max_size=12)


@given(WORDS, st.booleans(), DELTAS, st.text("ab", max_size=3), st.integers(0, 12))
@settings(max_examples=600, deadline=None)
def test_against_the_oracle(
    stop: list[str], include: bool, deltas: list[tuple[str, bool]], rest: str, fork_at: int
) -> None:
    checker, oracle = StopChecker(stop, include), Oracle(stop, include)
    shown = ""
    for step, (delta, searching) in enumerate(deltas):
        if step == fork_at:
            left_behind, checker = checker, checker.fork()
            left_behind.feed("abcabc", searching=True)
            left_behind.finish("x")
        found = checker.feed(delta, searching=searching)
        assert found == oracle.feed(delta, searching)
        assert checker.text == oracle.text
        assert checker.text.startswith(shown), "text that was shown has been taken back"
        shown = checker.text
        if found is not None:
            for ended in (checker, checker.fork()):
                ended.finish(rest)  # has nothing to add any more
                assert ended.text == shown
            return
    checker.finish(rest)
    assert checker.text == oracle.whole + rest
    assert checker.text.startswith(shown)
    checker.finish("again")
    assert checker.text == oracle.whole + rest


@given(WORDS, st.booleans(), st.text("ab\nc", max_size=30), st.lists(st.integers(0, 30), max_size=6))
@settings(max_examples=200, deadline=None)
def test_one_stop_string_ends_at_the_same_place_however_the_text_is_cut(
    words: list[str], include: bool, text: str, cuts: list[int]
) -> None:
    stop = words[:1]
    checker = StopChecker(stop, include)
    places = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    found = None
    for start, end in itertools.pairwise(places):
        found = checker.feed(text[start:end])
        if found is not None:
            break
    checker.finish("")
    at = text.find(stop[0])
    assert (found is None) == (at < 0)
    assert checker.text == (text if at < 0 else text[: at + len(stop[0]) if include else at])


def test_list_order_decides_within_one_piece() -> None:
    checker = StopChecker(["b", "a"], include=False)
    assert checker.feed("xaybz") == "b" and checker.text == "xay"


def test_the_piece_that_completes_one_decides_between_pieces() -> None:
    checker = StopChecker(["bc", "a"], include=False)
    assert checker.feed("xa") == "a" and checker.text == "x"


def test_across_pieces_and_the_rest_of_the_piece_is_cut() -> None:
    checker = StopChecker(["STOP"], include=False)
    assert checker.feed("one S") is None and checker.text == "on"
    assert checker.feed("TO") is None and checker.text == "one "
    assert checker.feed("P and more") == "STOP" and checker.text == "one "


def test_kept_stop_strings_hold_nothing_back() -> None:
    checker = StopChecker(["STOP"], include=True)
    assert checker.feed("one S") is None and checker.text == "one S"
    assert checker.feed("TOP and more") == "STOP" and checker.text == "one STOP"


@pytest.mark.parametrize("include", [False, True])
def test_one_that_was_complete_before_it_counted_is_not_found(include: bool) -> None:
    """Its text has been shown; finding it afterwards would take text back."""
    checker = StopChecker(["ab"], include)
    assert checker.feed("xab", searching=False) is None
    assert checker.feed("c") is None and checker.feed("ab") == "ab"
    assert checker.text == ("xabcab" if include else "xabc")


@pytest.mark.parametrize("include", [False, True])
def test_one_that_is_completed_once_it_counts_is_found(include: bool) -> None:
    checker = StopChecker(["ab"], include)
    assert checker.feed("xa", searching=False) is None
    assert checker.feed("bc") == "ab" and checker.text == ("xab" if include else "x")


def test_a_long_text_is_not_kept_twice() -> None:
    checker = StopChecker(["12345678"], include=False)
    for _ in range(1000):
        assert checker.feed("1234 ") is None
    assert len(checker._tail) == 7 and len(checker.text) == 5000 - 7
