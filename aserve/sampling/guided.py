"""Rows whose tokens must follow a grammar."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

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
        words = np.zeros((len(places), self._num_words), dtype=np.uint32)
        finishing: list[tuple[int, int]] = []
        failed: dict[int, str] = {}
        for i, slot in enumerate(slots):
            guide = self._guides[slot]
            row = words[i]
            try:
                if guide.broken is not None:
                    raise RuntimeError(guide.broken)
                if guide.ended:
                    finishing.append((i, guide.ends[0]))
                elif guide.matcher.fill(row):
                    if row.any():
                        for end in guide.ends:
                            row[end >> 5] |= np.uint32(1 << (end & 31))
                    else:
                        finishing.append((i, guide.ends[0]))
                elif not row.any():
                    raise RuntimeError("its guide allows no token that this model has")
            except Exception as error:
                guide.broken = guide.broken or _reason(error)
                failed[places[i]] = guide.broken
        bounds = self._bounds_of(words)
        if places == list(range(logits.shape[0])):
            torch.minimum(logits, bounds, out=logits)
        else:
            where = torch.tensor(places, device=logits.device)
            logits[where] = torch.minimum(logits[where], bounds)
        for i, end in finishing:
            logits[places[i], end] = 0.0
        for place in failed:
            logits[place] = 0.0
        return failed

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
    return f"its guide failed ({error})"
