"""Rows whose tokens must follow a grammar."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aserve import ops
from aserve.messages.step import GUIDE_UNUSABLE

logger = logging.getLogger(__name__)

_BOUNDS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") == 1, np.inf, -np.inf
).astype(np.float32)
"""By byte: upper bounds of the logits of the eight tokens its bits stand for, float32 ``[256, 8]``."""

_RECORDS = _BOUNDS.view([("bounds", np.float32, 8)]).ravel()
"""The same as 256 records, which numpy copies whole."""


@dataclass(slots=True)
class _Guide:
    """A slot's matcher and the tokens that end its sequence.

    ended: an end was drawn and the sequence went on all the same (``ignore_eos``, ``min_tokens``); only
        more ends follow, which stand for no text.
    broken: why the matcher cannot be used any more.
    """

    matcher: Any
    ends: list[int]
    ended: bool = False
    broken: str | None = None


class GuidedRows:
    """Matchers of the slots that have one, see :class:`aserve.guided.base.Matcher`."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // 32)
        self._device = device
        self._bounds = torch.from_numpy(_BOUNDS).to(device)
        self._guides: dict[int, _Guide] = {}

    @property
    def any(self) -> bool:
        """Whether there may be a slot with a matcher."""
        return bool(self._guides)

    def add(
        self, slot: int, grammar: Any, output: list[int], eos_token_id: int | None, stops: Iterable[int]
    ) -> None:
        """Gives ``slot`` a matcher that has seen ``output``; without a grammar it has none.

        stops: further tokens that end the sequence; those that stand for no text, as the end of a turn,
            may come wherever the end of the sequence may.
        """
        if grammar is None:
            self._guides.pop(slot, None)
            return
        ends = [] if eos_token_id is None else [eos_token_id]
        ends += [each for each in stops if each in grammar.textless and each != eos_token_id]
        guide = self._guides[slot] = _Guide(None, ends)
        try:
            guide.matcher = grammar.matcher()
        except Exception as error:  # a backend's failure is its row's alone
            guide.broken = _reason(error)
        for token in output:
            self.advance(slot, token)

    def fork(self, slot: int, parent_slot: int) -> None:
        parent = self._guides.get(parent_slot)
        if parent is None:
            self._guides.pop(slot, None)
            return
        guide = self._guides[slot] = _Guide(None, parent.ends, parent.ended, parent.broken)
        try:
            guide.matcher = parent.matcher.copy()
        except Exception as error:
            guide.broken = guide.broken or _reason(error)

    def apply(self, logits: torch.Tensor, places: list[int], slots: list[int]) -> dict[int, str]:
        """Forbids in rows ``places`` of ``logits`` (float32 ``[R, V]``) what the grammars of ``slots`` do not
        allow; a row whose output can only end keeps one end of sequence, whatever its logit was.

        Returns the places whose matcher failed, with the reason; those rows are zeroed.
        """
        words, finishing, broken = self._allowed(slots)
        bounds = self._bounds_of(words)
        if places == list(range(logits.shape[0])):
            torch.minimum(logits, bounds, out=logits)
        else:
            where = torch.tensor(places, device=logits.device)
            logits[where] = torch.minimum(logits[where], bounds)
        for i, end in finishing:
            logits[places[i], end] = 0.0
        failed = {places[i]: reason for i, reason in broken.items()}
        for place in failed:
            logits[place] = 0.0
        return failed

    def likeliest(
        self, logits: torch.Tensor, slots: list[int], token_ids: torch.Tensor, logprobs: torch.Tensor
    ) -> dict[int, str]:
        """Replaces the likeliest tokens of the rows of ``logits`` (float32 ``[G, V]``), int64 ``[G]``, by the
        likeliest that the grammars of ``slots`` allow, and their log-probabilities, float32 ``[G]``, which
        stay those that the model itself gives.

        A model that knows what it is to write mostly gives the token itself: then no mask is made. Returns
        the rows whose matcher failed, with the reason.
        """
        ids = token_ids.tolist()
        again = [i for i, token_id in enumerate(ids) if not self._accepts(slots[i], token_id)]
        if not again:
            return {}
        # Rows that keep their token allow just that one: no row has to be moved, and theirs cost nothing.
        words = np.zeros((len(slots), self._num_words), dtype=np.uint32)
        for i, token_id in enumerate(ids):
            words[i, token_id >> 5] = 1 << (token_id & 31)
        words[again], finishing, failed = self._allowed([slots[i] for i in again])
        for i in failed:
            words[again[i], 0] = 1  # any token: what is drawn here is thrown away
        for i, end in finishing:
            words[again[i], end >> 5] = 1 << (end & 31)
            if not math.isfinite(logits[again[i], end]):
                logits[again[i], end] = 0.0
        drawn, _ = ops.greedy_allowed(logits, torch.from_numpy(words.view(np.int32)).to(self._device))
        rows = torch.arange(len(slots), device=logits.device)
        logprobs += logits[rows, drawn] - logits[rows, token_ids]
        token_ids.copy_(drawn)
        return {again[i]: reason for i, reason in failed.items()}

    def _accepts(self, slot: int, token_id: int) -> bool:
        guide = self._guides[slot]
        if guide.ended or guide.broken is not None or token_id in guide.ends:
            return False
        accepted: bool = guide.matcher.accepts(token_id)
        return accepted

    def _allowed(self, slots: list[int]) -> tuple[np.ndarray, list[tuple[int, int]], dict[int, str]]:
        """What the grammars of ``slots`` allow next, uint32 ``[G, ceil(V / 32)]``; the rows whose output can
        only end, with the token that ends it; and those whose matcher failed, with the reason. Those rows
        allow nothing."""
        words = np.zeros((len(slots), self._num_words), dtype=np.uint32)
        finishing: list[tuple[int, int]] = []
        failed: dict[int, str] = {}
        guides = [self._guides[slot] for slot in slots]
        for i, may_end in self._fill(guides, words):
            guide, row = guides[i], words[i]
            try:
                if isinstance(may_end, Exception):
                    raise may_end
                if not row.any():
                    if not may_end:
                        raise RuntimeError("its guide allows no token that this model has")
                    finishing.append((i, guide.ends[0]))
                elif may_end:
                    for end in guide.ends:
                        row[end >> 5] |= np.uint32(1 << (end & 31))
            except Exception as error:
                guide.broken = guide.broken or _reason(error)
                row[:] = 0
        for i, guide in enumerate(guides):
            if guide.broken is not None:
                failed[i] = guide.broken
            elif guide.ended:
                finishing.append((i, guide.ends[0]))
        return words, finishing, failed

    def _fill(self, guides: list[_Guide], words: np.ndarray) -> Iterator[tuple[int, bool | Exception]]:
        """Fills the rows of the guides that go on; the row of each and whether it may end, or an error."""
        by_kind: dict[type, list[int]] = {}
        for i, guide in enumerate(guides):
            if guide.broken is None and not guide.ended:
                by_kind.setdefault(type(guide.matcher), []).append(i)
        for kind, rows in by_kind.items():
            matchers: Any = kind
            every = len(rows) == len(guides)
            part = words if every else words[rows]
            found = matchers.fill_all([guides[i].matcher for i in rows], part)
            if not every:
                words[rows] = part
            yield from zip(rows, found, strict=True)

    def _bounds_of(self, words: np.ndarray) -> torch.Tensor:
        """float32 ``[G, V]``, +inf for tokens whose bits are set and -inf for the others.

        A minimum with it is a twentieth of the cost of ``masked_fill_``, which does not vectorise on a CPU.
        """
        octets = words.view(np.uint8)
        if self._device.type == "cpu":
            bounds = torch.from_numpy(_RECORDS.take(octets).view(np.float32))
        else:
            bounds = self._bounds[torch.from_numpy(octets).to(self._device).int()]
        return bounds.view(len(words), -1)[:, : self._vocab_size]

    def advance(self, slot: int, token: int) -> None:
        """Tells the matcher of ``slot`` which token was drawn."""
        guide = self._guides[slot]
        if guide.ended or guide.broken is not None:
            return
        if token in guide.ends:
            guide.ended = True
            return
        try:
            guide.matcher.advance(token)
        except Exception as error:
            guide.broken = _reason(error)

    def broken(self, slot: int) -> str | None:
        """Why the row of ``slot`` cannot go on, if so."""
        return self._guides[slot].broken


def _reason(error: Exception) -> str:
    logger.warning("a guide failed while its output was drawn: %s", error)
    of_caller = getattr(error, "of_caller", False)
    return f"{GUIDE_UNUSABLE if of_caller else 'its guide failed'} ({error})"
