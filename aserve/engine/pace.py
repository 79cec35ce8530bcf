"""How much of a prompt may be computed beside decodes without slowing them down too much."""

from __future__ import annotations

import bisect
import math

from aserve.messages.step import StepPlan, StepResult

_STEP_SECONDS = 0.01
"""A step that takes no longer is quick enough for whoever reads its tokens, whatever it could have taken."""

_LEAST_TOKENS = 4
_CHUNK = 64
"""Prompt tokens that count as much as the step they are in."""

_URGENCY = 4
"""How much more a request counts that has no token yet: with it a crowd of 32 is served at 95 % of the speed
that it has without bounds, with 1 at 85 %."""

_LEAST_SECONDS = 1e-7
_MEMORY = 0.8


class DecodeTimes:
    """What steps of nothing but decodes take, by their number, learned as they pass.

    Between two numbers that have been seen the time is taken to grow evenly; above all of them in proportion,
    which is too long rather than too short; below all of them it is that of the fewest.
    """

    def __init__(self) -> None:
        self._counts: list[int] = []  # ascending
        self._seconds: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def learn(self, count: int, seconds: float) -> None:
        """Takes note of a step."""
        known = self._seconds.get(count)
        if known is None:
            bisect.insort(self._counts, count)
            known = seconds
        self._seconds[count] = _MEMORY * known + (1 - _MEMORY) * seconds

    def of(self, count: int) -> float:
        """Seconds of a step of so many; there must have been one."""
        counts, seconds = self._counts, self._seconds
        at = bisect.bisect_left(counts, count)
        if at == len(counts):
            return seconds[counts[-1]] * count / counts[-1]
        above = counts[at]
        if at == 0 or above == count:
            return seconds[above]
        below = counts[at - 1]
        share = (count - below) / (above - below)
        return (1 - share) * seconds[below] + share * seconds[above]


class Pace:
    """Sizes the chunks of prompts by what steps have taken so far.

    slowdown: a step that computes prompt tokens besides decodes is to take at most this many times what the
        decodes alone take, or ``_STEP_SECONDS`` if that is more; None for any time.

    For each request that waits for its first token as one decodes, steps may take ``_URGENCY`` times as long
    again. Else a crowd that comes at once would be served at a trickle for the sake of its first members.

    A step's time is taken as that of its decodes, plus one for having a prompt beside them, plus one for each
    of its tokens. The last two are corrected by each such step's error, in proportion to their part in it
    (normalised least mean squares, Widrow & Hoff 1960). Where the estimate is wrong, steps take longer or
    chunks are smaller than they might be; tokens do not depend on it.
    """

    def __init__(self, slowdown: float | None) -> None:
        self._slowdown = slowdown
        self._decodes = DecodeTimes()
        self._step_seconds = 0.0
        self._beside_seconds = 0.0
        self._token_seconds = 0.0
        self._drawing = 0

    @property
    def step_seconds(self) -> float:
        """What the last step of nothing but decodes took; 0 before there was one."""
        return self._step_seconds

    def issued(self, plan: StepPlan) -> None:
        """Takes note of a plan: what it draws for decodes in the next step."""
        self._drawing = len(plan.samples)

    def took(self, plan: StepPlan, result: StepResult) -> None:
        """Takes note of what a plan took."""
        seconds, decodes = result.seconds / result.steps, len(plan.slots) - plan.num_prefill_rows
        if not plan.num_prefill_rows:
            self._step_seconds = seconds
            if self._slowdown is not None and decodes:
                self._decodes.learn(decodes, seconds)
            return
        tokens = plan.num_tokens - decodes
        if not decodes or not self._token_seconds:
            if tokens >= _CHUNK:  # of few tokens the share of the step itself would be too large
                known = self._token_seconds or seconds / tokens
                self._token_seconds = _MEMORY * known + (1 - _MEMORY) * seconds / tokens
        elif self._decodes:
            estimate = self._decodes.of(decodes) + self._beside_seconds + self._token_seconds * tokens
            share = tokens / _CHUNK
            correction = (1 - _MEMORY) * (seconds - estimate) / (1 + share * share)
            self._beside_seconds = max(self._beside_seconds + correction, 0.0)
            self._token_seconds = max(self._token_seconds + correction * share / _CHUNK, _LEAST_SECONDS)

    def prompt_tokens(self, waiting: int = 0) -> float:
        """Most prompt tokens for the next step. waiting: requests of which nothing has been computed yet."""
        if self._slowdown is None or not (self._drawing and self._decodes and self._token_seconds):
            return math.inf
        alone = self._decodes.of(self._drawing)
        step = max(self._slowdown * alone, _STEP_SECONDS) * (1 + _URGENCY * waiting / self._drawing)
        return max(_LEAST_TOKENS, int((step - alone - self._beside_seconds) / self._token_seconds))
