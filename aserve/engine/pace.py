"""How much of a prompt may be computed beside decodes without slowing them down too much."""

from __future__ import annotations

import math

from aserve.messages.step import StepPlan, StepResult

_STEP_SECONDS = 0.01
"""A step that takes no longer is quick enough for whoever reads its tokens, whatever it could have taken."""

_LEAST_TOKENS = 4
_MEMORY = 0.8


class Pace:
    """Sizes the chunks of prompts by what steps have taken so far.

    slowdown: a step that computes prompt tokens besides decodes is to take at most this many times what the
        decodes alone take, or ``_STEP_SECONDS`` if that is more; None for any time.

    Requests that wait for their first token count as much as those that decode: with as many waiting as
    decoding, steps may take twice as long. Else a crowd that comes at once would be served at a trickle for
    the sake of its first members.

    A step's time is taken as that of its decodes plus one for each prompt token, which is what it is on a
    device that is busy with as few tokens as that. Where the estimate is wrong, steps take longer or chunks
    are smaller than they might be; tokens do not depend on it.
    """

    def __init__(self, slowdown: float | None) -> None:
        self._slowdown = slowdown
        self._decode_seconds = 0.0
        self._token_seconds = 0.0
        self._drawing = 0

    @property
    def step_seconds(self) -> float:
        """What the last step of nothing but decodes took; 0 before there was one."""
        return self._decode_seconds

    def issued(self, plan: StepPlan) -> None:
        """Takes note of a plan: what it draws for decodes in the next step."""
        self._drawing = len(plan.samples)

    def took(self, plan: StepPlan, result: StepResult) -> None:
        """Takes note of what a plan took."""
        if not plan.num_prefill_rows:
            self._decode_seconds = result.seconds / result.steps
            return
        decodes = len(plan.slots) - plan.num_prefill_rows
        tokens = plan.num_tokens - decodes
        if tokens < _LEAST_TOKENS:
            return
        seconds = max(result.seconds - (self._decode_seconds if decodes else 0.0), 0.0) / tokens
        known = self._token_seconds or seconds
        self._token_seconds = _MEMORY * known + (1 - _MEMORY) * seconds

    def prompt_tokens(self, waiting: int = 0) -> float:
        """Most prompt tokens for the next step. waiting: requests of which nothing has been computed yet."""
        if self._slowdown is None or not (self._drawing and self._decode_seconds and self._token_seconds):
            return math.inf
        step = max(self._slowdown * self._decode_seconds, _STEP_SECONDS) * (1 + waiting / self._drawing)
        return max(_LEAST_TOKENS, int((step - self._decode_seconds) / self._token_seconds))
