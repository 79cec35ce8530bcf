"""What the worker remembers between steps, one row per slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aserve.attention.base import AttentionMetadata
from aserve.messages.step import StepPlan


@dataclass(slots=True)
class ModelInputs:
    """A step as the model sees it. ``T`` tokens of ``B`` rows.

    last_positions: for each row, the index of its last token among the ``T``.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata
    query_start: list[int]


class BatchState:
    """Tokens and block tables of every slot, on the device.

    Drawn tokens are written straight into ``tokens`` and read from there by the next step, so a step
    can be scheduled before the tokens of the previous one are known to the host.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        # One more than the model's length: the last token of a full sequence is drawn, never computed.
        self.tokens = torch.zeros(num_slots, max_model_len + 1, dtype=torch.int32, device=device)
        max_blocks = -(-max_model_len // block_size)
        self.block_tables = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
        self._num_blocks = [0] * num_slots
        self._prompt_lengths: dict[int, int] = {}

    def apply(self, plan: StepPlan) -> None:
        """Takes over new sequences, forks and table changes."""
        for new in plan.new:
            self.tokens[new.slot, : len(new.token_ids)] = self._ints(new.token_ids, torch.int32)
            self._set_table(new.slot, 0, new.block_ids)
            if new.want_prompt_logprobs and new.params.prompt_logprobs is not None:
                self._prompt_lengths[new.slot] = new.num_prompt_tokens
            else:
                self._prompt_lengths.pop(new.slot, None)
        for fork in plan.forks:
            self.tokens[fork.slot, : fork.num_tokens] = self.tokens[fork.parent_slot, : fork.num_tokens]
            self._set_table(fork.slot, 0, fork.block_ids)
            self._prompt_lengths.pop(fork.slot, None)
        if plan.new_blocks:
            slots: list[int] = []
            columns: list[int] = []
            blocks: list[int] = []
            for slot, taken in plan.new_blocks:
                first = self._num_blocks[slot]
                slots += [slot] * len(taken)
                columns += range(first, first + len(taken))
                blocks += taken
                self._num_blocks[slot] = first + len(taken)
            values = self._ints(blocks, torch.int32)
            self.block_tables[self._ints(slots), self._ints(columns)] = values
        for slot, index, block in plan.replaced_blocks:
            self.block_tables[slot, index] = block

    def inputs(self, plan: StepPlan) -> ModelInputs:
        """Token ids, positions and attention metadata of the plan's rows."""
        num_rows = len(plan.slots)
        query_start = [0] * (num_rows + 1)
        for row, count in enumerate(plan.counts):
            query_start[row + 1] = query_start[row] + count
        total = query_start[-1]
        slots = torch.tensor(plan.slots)
        starts = torch.tensor(plan.starts)
        if total == num_rows:
            row_slots, positions = slots, starts
        else:
            counts = torch.tensor(plan.counts)
            firsts = torch.tensor(query_start[:-1])
            row_slots = slots.repeat_interleave(counts)
            positions = torch.arange(total) + (starts - firsts).repeat_interleave(counts)
        slots, row_slots, positions = self._move(slots), self._move(row_slots), self._move(positions)
        blocks = self.block_tables[row_slots, positions // self.block_size].long()
        seq_lens = [start + count for start, count in zip(plan.starts, plan.counts, strict=True)]
        longest = max(seq_lens)
        width = -(-longest // self.block_size)
        decodes = 0
        while decodes < num_rows and plan.counts[num_rows - 1 - decodes] == 1:
            decodes += 1
        metadata = AttentionMetadata(
            query_start=self._ints(query_start, torch.int32),
            seq_lens=self._ints(seq_lens, torch.int32),
            block_tables=self.block_tables[slots, :width],
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            max_query_len=max(plan.counts),
            max_seq_len=longest,
            num_decode_rows=decodes,
            query_start_host=query_start,
            seq_lens_host=seq_lens,
        )
        return ModelInputs(self.tokens[row_slots, positions], positions, metadata, query_start)

    def store_drawn(self, plan: StepPlan, token_ids: torch.Tensor) -> None:
        """Appends drawn tokens (int64 ``[S]``, parallel to ``plan.samples``) to their slots."""
        slots = self._ints([slot for _, slot in plan.samples])
        ends = self._ints([plan.starts[row] + plan.counts[row] for row, _ in plan.samples])
        self.tokens[slots, ends] = token_ids.to(torch.int32)

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

    @property
    def wants_prompt_logprobs(self) -> bool:
        return bool(self._prompt_lengths)

    def _set_table(self, slot: int, first: int, blocks: list[int]) -> None:
        if blocks:
            self.block_tables[slot, first : first + len(blocks)] = self._ints(blocks, torch.int32)
        self._num_blocks[slot] = first + len(blocks)

    def _ints(self, values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return self._move(torch.tensor(values, dtype=dtype))

    def _move(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self.device, non_blocking=True)
