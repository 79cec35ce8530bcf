"""Repetition, frequency and presence penalties."""

from __future__ import annotations

import numpy as np
import torch

from aserve import ops
from aserve.messages.params import SamplingParams

_LEAST = 1e-30
"""Logits divided by less are no longer finite. The likeliest of those divided by this is certain already."""


def rates(params: SamplingParams) -> tuple[float, float, float]:
    """Repetition, frequency and presence penalty."""
    return max(params.repetition_penalty, _LEAST), params.frequency_penalty, params.presence_penalty


class _Seen:
    """The distinct tokens that count against one sequence, and how often it has drawn each of them."""

    __slots__ = ("counts", "ids", "place", "size")

    def __init__(self, prompt: list[int], output: list[int]) -> None:
        ids, which = np.unique(np.array([*prompt, *output], dtype=np.int64), return_inverse=True)
        self.size = len(ids)
        self.ids = ids
        self.counts = np.bincount(which[len(prompt) :], minlength=self.size).astype(np.int32)
        self.place = dict(zip(ids.tolist(), range(self.size), strict=True))

    def copy(self) -> _Seen:
        other = object.__new__(_Seen)
        other.size, other.ids, other.counts = self.size, self.ids.copy(), self.counts.copy()
        other.place = dict(self.place)
        return other

    def count(self, token_id: int) -> None:
        at = self.place.get(token_id)
        if at is None:
            at = self.place[token_id] = self.size
            if at == len(self.ids):
                room = at + 64
                self.ids = np.concatenate([self.ids, np.zeros(room, dtype=np.int64)])
                self.counts = np.concatenate([self.counts, np.zeros(room, dtype=np.int32)])
            self.ids[at] = token_id
            self.size += 1
        self.counts[at] += 1


class PenaltyRows:
    """What the penalised sequences have seen, by slot. Slots without penalties take no room here."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._values: dict[int, tuple[float, float, float]] = {}

    def add(self, slot: int, params: SamplingParams, prompt: list[int], output: list[int]) -> None:
        # Only the repetition penalty looks at the prompt.
        self._seen[slot] = _Seen(prompt if params.repetition_penalty != 1.0 else [], output)
        self._values[slot] = rates(params)

    def fork(self, slot: int, parent: int) -> None:
        if parent not in self._seen:
            self.drop(slot)
            return
        self._seen[slot] = self._seen[parent].copy()
        self._values[slot] = self._values[parent]

    def drop(self, slot: int) -> None:
        self._seen.pop(slot, None)
        self._values.pop(slot, None)

    def apply(self, logits: torch.Tensor, rows: list[int], slots: list[int]) -> None:
        """Penalises ``logits[rows[i]]`` by what ``slots[i]`` has seen, in place; the rows rise.

        Repetition (Keskar et al. 2019, CTRL) looks at prompt and output; frequency and presence, as
        OpenAI defines them, at the output only.
        """
        seen = [self._seen[slot] for slot in slots]
        sizes = np.zeros(len(logits) + 1, dtype=np.int64)
        rates = np.zeros((3, len(logits)), dtype=np.float32)
        rates[0] = 1.0
        at = np.array(rows)
        sizes[at + 1] = [each.size for each in seen]
        rates[:, at] = np.array([self._values[slot] for slot in slots], dtype=np.float32).T
        parts = (
            sizes.cumsum(),
            np.concatenate([each.ids[: each.size] for each in seen]),
            np.concatenate([each.counts[: each.size] for each in seen]),
            *rates,
        )
        ops.penalties(logits, *(torch.from_numpy(each).to(logits.device) for each in parts))

    def count(self, slot: int, token_id: int) -> None:
        self._seen[slot].count(token_id)
