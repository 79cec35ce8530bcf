"""What the worker remembers between steps, one row per slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from aserve.attention.base import AttentionMetadata
from aserve.messages.step import NewSequence, StepPlan


@dataclass(slots=True)
class ModelInputs:
    """A step as the model sees it. ``T`` tokens of ``B`` rows.

    last_tokens: int64 ``[B]`` on the host: each row's last token among the ``T``.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata
    last_tokens: np.ndarray


class SlotFacts:
    """What is wanted of slots besides tokens. tokens: int32 ``[S, W]``, of every slot."""

    tokens: torch.Tensor

    def __init__(self) -> None:
        self._prompt_lengths: dict[int, int] = {}
        self.pooled: set[int] = set()
        """Slots whose sample is a hidden state."""

    def take(self, new: NewSequence) -> None:
        if new.want_prompt_logprobs and new.params.prompt_logprobs is not None:
            self._prompt_lengths[new.slot] = new.num_prompt_tokens
        else:
            self._prompt_lengths.pop(new.slot, None)
        (self.pooled.add if new.pooled else self.pooled.discard)(new.slot)

    def forget(self, slot: int) -> None:
        self._prompt_lengths.pop(slot, None)
        self.pooled.discard(slot)

    def prompt_span(self, plan: StepPlan, row: int) -> tuple[int, torch.Tensor] | None:
        """For a row whose prompt log-probabilities are wanted: how many of its tokens predict a
        prompt token, and those predicted tokens (int64); None if there are none."""
        slot = plan.slots[row]
        length = self._prompt_lengths.get(slot)
        if length is None:
            return None
        start = plan.starts[row]
        count = min(start + plan.counts[row], length - 1) - start
        if count <= 0:
            del self._prompt_lengths[slot]
            return None
        return count, self.tokens[slot, start + 1 : start + 1 + count].long()

    def pools(self, plan: StepPlan) -> bool:
        """Whether a row of the plan belongs to a pooled sequence."""
        return bool(self.pooled) and not self.pooled.isdisjoint(plan.slots)

    def lists_prompts(self, plan: StepPlan) -> bool:
        """Whether log-probabilities of a prompt may be wanted of a row of the plan."""
        return bool(self._prompt_lengths) and not self._prompt_lengths.keys().isdisjoint(plan.slots)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return bool(self._prompt_lengths)


class BatchState(SlotFacts):
    """Tokens of every slot on the device, block tables of every slot on the host.

    Drawn tokens are written straight into ``tokens`` and read from there by the next step, so a step
    can be scheduled before the tokens of the previous one are known to the host. Which blocks a slot has
    the host decides, so everything else about a step is worked out there, with a few calls of numpy that
    do not grow with the batch: torch's fixed cost a call is several times higher.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        super().__init__()
        self.block_size = block_size
        self.device = device
        # One more than the model's length: the last token of a full sequence is drawn, never computed.
        self._width = max_model_len + 1
        self.tokens = torch.zeros(num_slots, self._width, dtype=torch.int32, device=device)
        self._flat = self.tokens.view(-1)
        max_blocks = -(-max_model_len // block_size)
        self.block_tables = np.zeros((num_slots, max_blocks), dtype=np.int32)
        self.host_tables = torch.from_numpy(self.block_tables)
        """The same memory as a tensor."""
        self._num_blocks = [0] * num_slots

    def apply(self, plan: StepPlan) -> None:
        """Takes over new sequences, forks, chosen tokens and table changes."""
        for new in plan.new:
            ids = np.array(new.token_ids, dtype=np.int32)
            self.tokens[new.slot, : len(ids)] = self._move(ids)
            self._set_table(new.slot, new.block_ids)
            self.take(new)
        for fork in plan.forks:
            self.tokens[fork.slot, : fork.num_tokens] = self.tokens[fork.parent_slot, : fork.num_tokens]
            self._set_table(fork.slot, fork.block_ids)
            self.forget(fork.slot)
        if plan.chosen:
            places = np.array([slot * self._width + position for slot, position, _ in plan.chosen])
            tokens = np.array([token for _, _, token in plan.chosen], dtype=np.int32)
            self._flat[self._move(places)] = self._move(tokens)
        for slot, taken in plan.new_blocks:
            first = self._num_blocks[slot]
            self._num_blocks[slot] = last = first + len(taken)
            self.block_tables[slot, first:last] = taken
        for slot, index, block in plan.replaced_blocks:
            self.block_tables[slot, index] = block

    def inputs(self, plan: StepPlan) -> ModelInputs:
        """Token ids, positions and attention metadata of the plan's rows."""
        slots, starts = np.array(plan.slots), np.array(plan.starts)
        num_rows = len(slots)
        counts = np.array(plan.counts)
        seq_lens = starts + counts
        query_start = np.zeros(num_rows + 1, dtype=np.int64)
        np.cumsum(counts, out=query_start[1:])
        total = int(query_start[-1])
        tables = self.block_tables
        if total == num_rows:
            row_slots, positions, decodes = slots, starts, num_rows
        else:
            row_slots = np.repeat(slots, counts)
            positions = np.arange(total) + np.repeat(starts - query_start[:-1], counts)
            longer = np.flatnonzero(counts > 1)
            decodes = num_rows - 1 - int(longer[-1])
        blocks = tables[row_slots, positions // self.block_size].astype(np.int64)
        longest = int(seq_lens.max())
        width = -(-longest // self.block_size)
        metadata = AttentionMetadata(
            query_start=self._move(query_start.astype(np.int32)),
            seq_lens=self._move(seq_lens.astype(np.int32)),
            block_tables=self._move(tables[slots, :width]),
            slot_mapping=self._move(blocks * self.block_size + positions % self.block_size),
            max_query_len=int(counts.max()),
            max_seq_len=longest,
            num_decode_rows=decodes,
            query_start_host=query_start.tolist(),
            seq_lens_host=seq_lens.tolist(),
        )
        token_ids = self._flat[self._move(row_slots * self._width + positions)].long()
        return ModelInputs(token_ids, self._move(positions), metadata, query_start[1:] - 1)

    def store_drawn(self, plan: StepPlan, token_ids: torch.Tensor) -> None:
        """Appends drawn tokens (int64 ``[S]``, parallel to ``plan.samples``) to their slots."""
        starts, counts, width = plan.starts, plan.counts, self._width
        ends = np.array([slot * width + starts[row] + counts[row] for row, slot in plan.samples])
        self._flat[self._move(ends)] = token_ids.to(torch.int32)

    def _set_table(self, slot: int, blocks: list[int]) -> None:
        self.block_tables[slot, : len(blocks)] = blocks
        self._num_blocks[slot] = len(blocks)

    def _move(self, host: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(host).to(self.device, non_blocking=True)
