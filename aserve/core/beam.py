"""Beam search over candidates: which continuations live on, which have ended, and when it is over.

What transformers' ``generate(num_beams=k, do_sample=False)`` does (its releases from 4.50 on), in which
only output tokens count for the length penalty, the token that ends a hypothesis included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Candidate:
    """A continuation of beam ``parent`` by one token.

    rank: place of the token among those of its beam, 0 for the likeliest.
    total: log-probability of the whole output.
    """

    parent: int
    rank: int
    token_id: int
    total: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An output that has ended.

    total, score: its log-probability, and that divided by its length to the power of the length penalty.
    length: output tokens, the last included.
    content: whatever the caller made of it.
    """

    score: float
    total: float
    length: int
    content: Any


@dataclass(slots=True)
class Beam:
    """A running beam: its log-probability so far, and its likeliest next tokens, likeliest first."""

    total: float
    token_ids: list[int]
    logprobs: list[float]


class BeamSearch:
    """The search of one request.

    width: beams, and hypotheses kept.
    max_length: output tokens at which everything ends.
    num_ends: tokens that end a hypothesis.
    early_stopping: True ends the search as soon as ``width`` hypotheses have ended, False once the best
        beam would not make a better hypothesis than the worst of those if it ended now, "never" once it
        could not at any length, if ``length_penalty`` is positive.
    """

    __slots__ = (
        "done",
        "early_stopping",
        "hypotheses",
        "length",
        "length_penalty",
        "max_length",
        "num_candidates",
        "width",
    )

    def __init__(
        self,
        width: int,
        max_length: int,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        num_ends: int = 1,
    ) -> None:
        self.width = width
        self.max_length = max_length
        self.length_penalty = length_penalty
        self.early_stopping = early_stopping
        self.num_candidates = max(2, 1 + num_ends) * width
        """Next tokens to look at, of each beam and of all: enough for ``width`` that end nothing."""
        self.length = 0
        self.hypotheses: list[Hypothesis] = []
        """The best that have ended, best first."""
        self.done = False

    def advance(
        self,
        beams: list[Beam],
        ends: Callable[[Candidate], bool],
        keep: Callable[[Candidate], Any],
    ) -> list[Candidate]:
        """Takes one step, and returns the beams to go on with, likeliest first; none once ``done``.

        beams: all running ones, with at least ``num_candidates`` next tokens each, or as many as there are.
        ends: whether a candidate ends its output; asked once for each that is looked at, best first.
        keep: makes the content of a hypothesis that is kept.
        """
        found = [
            Candidate(parent, rank, token_id, beam.total + logprob)
            for parent, beam in enumerate(beams)
            for rank, (token_id, logprob) in enumerate(zip(beam.token_ids, beam.logprobs, strict=True))
            if logprob != float("-inf")
        ]
        found.sort(key=lambda each: -each.total)
        self.length += 1
        running: list[Candidate] = []
        for place, candidate in enumerate(found[: self.num_candidates]):
            if place >= self.width and len(running) == self.width:
                break
            if ends(candidate):
                # Likely enough, or it is not worth more than those that go on.
                if place < self.width:
                    self.end(candidate.total, partial(keep, candidate))
            elif len(running) < self.width:
                running.append(candidate)
        self.done = not running or self._enough(running[0].total)
        return [] if self.done else running

    def end(self, total: float, content: Callable[[], Any]) -> None:
        """Keeps an output of the present length as a hypothesis if it is among the best."""
        score = self.score(total, self.length)
        if len(self.hypotheses) == self.width and score <= self.hypotheses[-1].score:
            return
        self.hypotheses.append(Hypothesis(score, total, self.length, content()))
        self.hypotheses.sort(key=lambda each: -each.score)
        del self.hypotheses[self.width :]

    def score(self, total: float, length: int) -> float:
        """What a hypothesis is worth; one without any token counts as having one."""
        scale: float = max(length, 1) ** self.length_penalty
        return total / scale

    def _enough(self, best: float) -> bool:
        if len(self.hypotheses) < self.width:
            return False
        if self.early_stopping is True:
            return True
        longest = self.early_stopping == "never" and self.length_penalty > 0.0
        length = self.max_length if longest else self.length
        return self.score(best, length) <= self.hypotheses[-1].score
