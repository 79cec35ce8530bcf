"""What the scheduler tells about its requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aserve.core.sequence import Sequence, SequenceGroup
from aserve.messages.step import SampleLogprobs

if TYPE_CHECKING:
    import numpy as np


@dataclass(slots=True)
class TokenUpdate:
    """One drawn token, already appended to its sequence."""

    seq: Sequence
    token_id: int
    logprob: float
    details: SampleLogprobs | None


@dataclass(slots=True)
class Commit:
    """What a finished step changed, in the order it is to be told.

    pooled: requests that ended with the vector of their prompt, float32 ``[H]``.
    prompt_tokens: tokens of prompts it took care of, those found in the prefix cache included.
    steps: how many tokens each of its sequences got.
    """

    tokens: list[TokenUpdate] = field(default_factory=list)
    failed: list[tuple[SequenceGroup, str]] = field(default_factory=list)
    pooled: list[tuple[SequenceGroup, np.ndarray]] = field(default_factory=list)
    prompt_tokens: int = 0
    steps: int = 1


@dataclass(slots=True)
class Ledger:
    """What became of every request ever received.

    rejected: never queued, because the queue was full or the prompt can never fit.
    aborted: given up by the caller or at its deadline.
    """

    received: int = 0
    finished: int = 0
    aborted: int = 0
    rejected: int = 0
    failed: int = 0

    def verify(self, live: int) -> None:
        """Raises RuntimeError if a request was lost or counted twice; ``live`` are queued or running."""
        if self.received != self.finished + self.aborted + self.rejected + self.failed + live:
            raise RuntimeError(f"requests do not add up: {self}, {live} unfinished")


@dataclass(slots=True)
class PrefixCounts:
    """Prompt tokens of requests that looked into the prefix cache, and how many were found there."""

    queries: int = 0
    hits: int = 0
