"""Repetition, frequency and presence penalties."""

from __future__ import annotations

import torch

from aserve.messages.params import SamplingParams


class PenaltyRows:
    """Which tokens the penalised sequences have seen, one row per slot that needs one."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._prompt: dict[int, torch.Tensor] = {}
        self._counts: dict[int, torch.Tensor] = {}
        self._params: dict[int, SamplingParams] = {}

    def add(self, slot: int, params: SamplingParams, prompt: list[int], output: list[int]) -> None:
        seen = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
        seen[torch.tensor(prompt, device=self._device)] = True
        counts = torch.zeros(self._vocab_size, dtype=torch.float32, device=self._device)
        if output:
            ids = torch.tensor(output, device=self._device)
            counts.index_add_(0, ids, torch.ones(len(output), device=self._device))
        self._prompt[slot], self._counts[slot], self._params[slot] = seen, counts, params

    def fork(self, slot: int, parent: int) -> None:
        if parent not in self._params:
            self.drop(slot)
            return
        self._prompt[slot] = self._prompt[parent]  # never written after add
        self._counts[slot] = self._counts[parent].clone()
        self._params[slot] = self._params[parent]

    def drop(self, slot: int) -> None:
        self._prompt.pop(slot, None)
        self._counts.pop(slot, None)
        self._params.pop(slot, None)

    def apply(self, logits: torch.Tensor, rows: list[int], slots: list[int]) -> None:
        """Penalises ``logits[rows[i]]`` by what ``slots[i]`` has seen, in place.

        Repetition (Keskar et al. 2019, CTRL) looks at prompt and output; frequency and presence, as
        OpenAI defines them, at the output only.
        """
        index = torch.tensor(rows, device=logits.device)
        counts = torch.stack([self._counts[slot] for slot in slots])
        seen = torch.stack([self._prompt[slot] for slot in slots]) | (counts > 0)
        values = torch.tensor(
            [
                (
                    self._params[slot].repetition_penalty,
                    self._params[slot].frequency_penalty,
                    self._params[slot].presence_penalty,
                )
                for slot in slots
            ],
            device=logits.device,
        )
        repetition, frequency, presence = (column.unsqueeze(1) for column in values.unbind(1))
        picked = logits[index]
        repeated = torch.where(picked > 0, picked / repetition, picked * repetition)
        picked = torch.where(seen, repeated, picked)
        picked -= frequency * counts
        picked -= presence * (counts > 0)
        logits[index] = picked

    def count(self, slot: int, token_id: int) -> None:
        self._counts[slot][token_id] += 1.0
