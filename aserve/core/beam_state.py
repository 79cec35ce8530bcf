"""What a request with beam search has besides its sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from aserve.core.beam import BeamSearch
from aserve.messages.step import SampleLogprobs

if TYPE_CHECKING:
    from aserve.core.sequence import Sequence, SequenceGroup


class Trail:
    """Log-probabilities of an output's tokens, from the last to the first; forks have theirs in common."""

    __slots__ = ("before", "details")

    def __init__(self, before: Trail | None, details: SampleLogprobs) -> None:
        self.before = before
        self.details = details


def unrolled(trail: Trail | None) -> list[SampleLogprobs]:
    """From the first token to the last."""
    found = []
    while trail is not None:
        found.append(trail.details)
        trail = trail.before
    return found[::-1]


class TextWatch(Protocol):
    """Looks for stop strings in the texts of beams. Raises RequestFailedError if a text cannot be made."""

    def look(self, beam: Sequence, token_id: int) -> str | None:
        """The stop string that a beam's text has once this token follows."""

    def follow(self, taken: list[tuple[Sequence, Sequence, int]]) -> None:
        """The running beams are these now: ``(beam, the one it came from, its new token)``."""


class BeamState:
    """The search, and where its beams stand.

    reports: the candidates of the beams whose next token has been computed; the search goes on once there
        are those of all.
    parked: beams without slot or blocks. After a preemption that gave up the blocks the beams come back one
        after the other, each sharing what it can with those before, or they would need more blocks than
        they had.
    in_flight: rows in plans whose results are not here yet.
    trails: log-probabilities of the outputs, where asked for.
    """

    __slots__ = ("in_flight", "parked", "reports", "search", "trails", "watch")

    def __init__(self, group: SequenceGroup) -> None:
        params = group.params
        ends = set(group.stop_ids)
        if group.eos_token_id is not None and not params.ignore_eos:
            ends.add(group.eos_token_id)
        self.search = BeamSearch(
            group.width,
            group.max_known - group.num_prompt_tokens,
            params.length_penalty,
            params.early_stopping,
            len(ends),
        )
        self.reports: dict[Sequence, SampleLogprobs] = {}
        self.parked: list[Sequence] = []
        self.in_flight = 0
        self.trails: dict[Sequence, Trail | None] = {}
        self.watch: TextWatch | None = None
