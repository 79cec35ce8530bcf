"""Drawing tokens without the host: nothing here waits for the device, or needs a token to be known.

Everything that depends on a row's request is known before the step and sent with it; what the host must
know of the result, failed rows included, goes back with the drawn tokens. Rows that need the host in
between (a guide, a logits processor, candidates of beams) are :class:`SamplerState`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from aserve import ops
from aserve.messages.step import SampleLogprobs
from aserve.sampling.rng import uniforms
from aserve.sampling.sampler import IN_A_PASS, Needs, SamplerState, why_not_finite

_NONE = float("-inf")
_FREE = Needs.DRAW | Needs.TRUNCATION | Needs.PENALTIES | Needs.MIN_TOKENS | Needs.LOGPROBS

_AT_ONCE = 1 << 23
"""Scores that are sorted or added up at a time: each takes some fifty bytes meanwhile."""

History = Callable[[torch.Tensor, int], torch.Tensor]
"""Slots int64 ``[R]`` and a length to those slots' first tokens, int64 ``[R, length]``."""


class Arrays(Protocol):
    """Where the host's numbers are handed in before the step, and are tensors within it."""

    def add(self, array: np.ndarray) -> int: ...

    def __getitem__(self, number: int) -> torch.Tensor: ...


@dataclass(slots=True)
class Drawn:
    """What :meth:`Draw.run` leaves on the device.

    token_ids: int64 ``[S]``. logprobs, highest: float32 ``[S]``; the drawn token's log-probability and the
    largest logit, neither finite where nothing could be drawn. ranks: int64 ``[L]``, and tops: float32 and
    int64 ``[L, width]``, log-probabilities and ids in order, of the rows that list them.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    highest: torch.Tensor
    ranks: torch.Tensor | None = None
    tops: tuple[torch.Tensor, torch.Tensor] | None = None


def is_free(state: SamplerState, slots: list[int]) -> np.ndarray:
    """Which of these slots' rows can be drawn here, bool ``[S]``."""
    free: np.ndarray = state.needs[slots] & ~_FREE == 0
    return free


class _Part(ABC):
    """Rows of a step that are drawn alike. rows: which, rising. slots, needs: theirs."""

    def __init__(
        self, state: SamplerState, rows: np.ndarray, slots: np.ndarray, needs: np.ndarray, arrays: Arrays
    ) -> None:
        self.count = len(rows)
        self._arrays, add = arrays, arrays.add
        self._rows = add(rows)
        banned = [
            row * state.vocab_size + np.array(state.banned(int(slot)), dtype=np.int64)
            for row, slot in enumerate(slots)
            if needs[row] & Needs.MIN_TOKENS and state.num_output[slot] < state.min_tokens[slot]
        ]
        self._banned = add(np.concatenate(banned)) if banned else None
        penalised = np.flatnonzero(needs & Needs.PENALTIES)
        self._penalties = None
        if len(penalised):
            chosen = slots[penalised]
            prompts = np.array([state.prompt_length(int(slot)) for slot in chosen], dtype=np.int64)
            lengths = prompts + state.num_output[chosen]
            values = np.array([state.penalties(int(slot)) for slot in chosen], dtype=np.float32)
            self._penalties = add(penalised), add(chosen), add(prompts), add(lengths), add(values)
            self._longest = int(lengths.max())

    @property
    def index(self) -> torch.Tensor:
        return self._arrays[self._rows]

    @abstractmethod
    def draw(self, logits: torch.Tensor, history: History) -> Drawn:
        """Draws these rows of the step's logits, which stay as they are."""

    def _edited(self, logits: torch.Tensor, history: History) -> torch.Tensor:
        """A copy of these rows of the logits, with what bans and penalties make of them."""
        arrays = self._arrays
        logits = logits.index_select(0, self.index)
        if self._banned is not None:
            logits.view(-1).index_fill_(0, arrays[self._banned], _NONE)
        if self._penalties is not None:
            # Not by the kernel for penalties: it takes distinct tokens and their counts, and the host, which
            # has them, does not know the token drawn last.
            rows, slots, *rest = (arrays[each] for each in self._penalties)
            part = penalised(logits.index_select(0, rows), history(slots, self._longest), *rest)
            logits.index_copy_(0, rows, part)
        return logits


class _InAPass(_Part):
    """Rows that need no more than :func:`aserve.ops.sample` does."""

    def __init__(
        self, state: SamplerState, rows: np.ndarray, slots: np.ndarray, needs: np.ndarray, arrays: Arrays
    ) -> None:
        super().__init__(state, rows, slots, needs, arrays)
        temperature = np.where(needs & Needs.DRAW, state.temperature[slots], np.float32(0))
        columns = (temperature, state.seeds[slots].view(np.int64), state.num_output[slots])
        self._columns = [arrays.add(each) for each in columns]

    def draw(self, logits: torch.Tensor, history: History) -> Drawn:
        if self._banned is not None or self._penalties is not None:
            logits = self._edited(logits, history)
        elif self.count < len(logits):
            logits = logits.index_select(0, self.index)
        highest = logits.amax(-1)
        temperature, seeds, positions = (self._arrays[each] for each in self._columns)
        # Beside a logit so large that the quotient would be infinite, no lower one is likely at all.
        temperature = temperature.masked_fill(torch.isinf(highest / temperature), 0.0)
        return Drawn(*ops.sample(logits, temperature, seeds, positions), highest)


class _InSteps(_Part):
    """Rows that are drawn as ``SamplerState._sample`` draws them, in its order."""

    def __init__(
        self, state: SamplerState, rows: np.ndarray, slots: np.ndarray, needs: np.ndarray, arrays: Arrays
    ) -> None:
        super().__init__(state, rows, slots, needs, arrays)
        add = arrays.add
        drawn = np.flatnonzero(needs & Needs.DRAW)
        self._drawn = self._cut = None
        if len(drawn):
            u = uniforms(state.seeds[slots[drawn]], state.num_output[slots[drawn]])
            self._drawn = add(drawn), add(u), add(state.temperature[slots])
        cut = np.flatnonzero(needs & Needs.TRUNCATION)
        if len(cut):
            chosen = slots[cut]
            with np.errstate(divide="ignore"):
                least = np.log(state.min_p[chosen]).astype(np.float32)
            self._cut = add(cut), add(state.top_k[chosen]), add(state.top_p[chosen]), add(least)
        listed = np.flatnonzero(needs & Needs.LOGPROBS)
        self._listed = add(listed) if len(listed) else None
        self._width = max((state.top(int(slot)) for slot in slots[listed]), default=0)

    def draw(self, logits: torch.Tensor, history: History) -> Drawn:
        arrays = self._arrays
        logits = self._edited(logits, history)
        highest, token_ids = logits.max(-1)
        broken = ~torch.isfinite(highest)
        # Any finite row: what is drawn from it is thrown away.
        logits.masked_fill_(broken.unsqueeze(1), 0.0)
        if self._drawn is not None:
            temperature = arrays[self._drawn[2]]
            finite = highest.masked_fill(broken, 0.0)
            # As in the sampler: a logit so large that the quotient would be infinite.
            shift = torch.where(torch.isinf(finite / temperature), finite, 0.0)
            logits.sub_(shift.unsqueeze(1)).div_(temperature.unsqueeze(1))
        if self._cut is not None:
            rows, *limits = (arrays[each] for each in self._cut)
            logits.index_copy_(0, rows, _in_pieces(truncated, logits.index_select(0, rows), *limits))
        logprobs = logits.log_softmax(-1)
        if self._drawn is not None:
            rows, u = arrays[self._drawn[0]], arrays[self._drawn[1]]
            found = _in_pieces(_at, logits.index_select(0, rows), u)
            token_ids = token_ids.index_copy(0, rows, found)
        own = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1)
        drawn = Drawn(token_ids, own, highest)
        if self._listed is not None:
            rows = arrays[self._listed]
            part, chosen = logprobs.index_select(0, rows), own.index_select(0, rows)
            drawn.ranks = (part > chosen.unsqueeze(1)).sum(-1) + 1
            if self._width:
                # Stable: equally likely tokens by id.
                values, ids = torch.sort(part, dim=-1, descending=True, stable=True)
                drawn.tops = values[:, : self._width], ids[:, : self._width]
        return drawn


class Draw:
    """The draw of one step for slots ``[S]`` that :func:`is_free`: its numbers, added to ``arrays``.

    device: where it is drawn. What a kernel there draws in one pass over the logits it draws, as the common
    sampler's does. The slots count as having drawn.
    """

    def __init__(self, state: SamplerState, slots: list[int], arrays: Arrays, device: torch.device) -> None:
        index = np.array(slots, dtype=np.int64)
        needs = state.needs[index]
        self.count = len(slots)
        # How a row is drawn must depend on its own needs alone.
        passed = (needs & ~IN_A_PASS == 0) & ops.samples(device)
        self._parts: list[_Part] = []
        self.listed: list[int] = []
        """Indices of the samples whose likeliest tokens are listed."""
        self._counts: list[int] = []
        rows = np.flatnonzero((needs != 0) & passed)
        if len(rows):
            self._parts.append(_InAPass(state, rows, index[rows], needs[rows], arrays))
        rows = np.flatnonzero((needs != 0) & ~passed)
        if len(rows):
            self._parts.append(_InSteps(state, rows, index[rows], needs[rows], arrays))
            listed = rows[needs[rows] & Needs.LOGPROBS != 0]
            self.listed = listed.tolist()
            self._counts = [state.top(slots[row]) for row in self.listed]
        state.num_output[index] += 1

    def run(
        self,
        logits: torch.Tensor,
        history: History,
        greedy: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Drawn:
        """logits: float32 ``[S, V]``, not changed. greedy: what :func:`aserve.ops.greedy_logprob` gives for
        them, where it is known."""
        if self._parts and self._parts[0].count == self.count:
            return self._parts[0].draw(logits, history)
        token_ids, logprobs = ops.greedy_logprob(logits) if greedy is None else greedy
        drawn = Drawn(token_ids, logprobs, logits.amax(-1))
        for each in self._parts:
            index, part = each.index, each.draw(logits, history)
            drawn = Drawn(
                drawn.token_ids.index_copy(0, index, part.token_ids),
                drawn.logprobs.index_copy(0, index, part.logprobs),
                drawn.highest.index_copy(0, index, part.highest),
                part.ranks,
                part.tops,
            )
        return drawn

    def failed(self, logprobs: np.ndarray, highest: np.ndarray) -> dict[int, str]:
        """Why samples could not be drawn, from what came back of :class:`Drawn`."""
        fine = np.isfinite(logprobs) & np.isfinite(highest)
        return {int(i): why_not_finite(float(highest[i])) for i in np.flatnonzero(~fine)}

    def details(
        self, logprobs: np.ndarray, ranks: np.ndarray, tops: tuple[np.ndarray, np.ndarray] | None
    ) -> dict[int, SampleLogprobs]:
        """The lists of likeliest tokens, by sample."""
        entries = {}
        for at, (sample, count) in enumerate(zip(self.listed, self._counts, strict=True)):
            values, ids = ([], []) if tops is None else (each[at, :count].tolist() for each in tops)
            entries[sample] = SampleLogprobs(float(logprobs[sample]), int(ranks[at]), ids, values)
        return entries


def _in_pieces(function: Callable[..., torch.Tensor], *by_row: torch.Tensor) -> torch.Tensor:
    """What the function gives for some rows at a time of tensors that have the same rows."""
    step = max(1, _AT_ONCE // by_row[0].shape[1])
    if step >= len(by_row[0]):
        return function(*by_row)
    return torch.cat(
        [function(*parts) for parts in zip(*(torch.split(each, step) for each in by_row), strict=True)]
    )


def _at(scores: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Tokens ``[R]`` at ``u`` (float64 ``[R]``) of the cumulative distributions of ``[R, V]``."""
    sums = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    # Below the last sum even after rounding, because u is at most 1 - 2**-53.
    return torch.searchsorted(sums, (u * sums[:, -1]).unsqueeze(1), right=True).squeeze(1)


def penalised(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """As :meth:`aserve.sampling.penalties.PenaltyRows.apply`, from the sequences themselves.

    logits: float32 ``[R, V]``, overwritten. tokens: int64 ``[R, L]``; of each row the first ``lengths`` are
    its sequence and of those the first ``prompts`` its prompt, both int64 ``[R]``. values: float32
    ``[R, 3]``, repetition, frequency and presence penalty.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    within = places < lengths.unsqueeze(1)
    repetition, frequency, presence = values.unsqueeze(2).unbind(1)
    # Sums of ones, which are exact in any order.
    seen = torch.zeros_like(logits).scatter_add_(1, tokens, within.float()) > 0
    drawn = within & (places >= prompts.unsqueeze(1))
    counts = torch.zeros_like(logits).scatter_add_(1, tokens, drawn.float())
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - frequency * counts - presence * (counts > 0)


def truncated(
    scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, least: torch.Tensor
) -> torch.Tensor:
    """As :func:`aserve.sampling.truncation.truncate`, by sorting every row: the scores that are left.

    scores: float32 ``[R, V]``. top_k: int64, top_p: float64, least: float32 ``[R]``, the logarithm of min_p.
    """
    vocab = scores.shape[1]
    # Stable: of equals, lower ids first.
    values, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    kth = values.gather(1, (top_k - 1).unsqueeze(1))
    kept = (values >= kth) | (top_k >= vocab).unsqueeze(1)
    p = top_p.unsqueeze(1)
    mass = (values.double() - values[:, :1]).masked_fill_(~kept, _NONE).exp_()
    total = mass.cumsum(-1)
    likely = total - mass < p * total[:, -1:]
    likely[:, 0] = True
    kept &= likely | (p >= 1.0)
    kept &= values >= values[:, :1] + least.unsqueeze(1)
    values.masked_fill_(~kept, _NONE)
    return torch.empty_like(scores).scatter_(1, ids, values)
