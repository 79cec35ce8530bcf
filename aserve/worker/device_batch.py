"""What a device with memory of its own remembers between steps, one row per slot."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from aserve.attention.base import AttentionMetadata
from aserve.messages.step import StepPlan
from aserve.worker.batch_state import ModelInputs, SlotFacts
from aserve.worker.staging import Upload


@dataclass(slots=True)
class Sections:
    """Where in the upload the parts of a step are; None or empty for what the step does not have."""

    slots: int = -1
    positions: int = -1
    new: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """slot, tokens and how many, blocks and how many"""
    forks: list[tuple[int, int]] = field(default_factory=list)
    """index into the plan's forks, blocks"""
    chosen: tuple[int, int] | None = None
    tables: tuple[int, int] | None = None
    ends: int | None = None
    rows: tuple[int, int, int] | None = None
    """slots, sequence lengths and query starts of the rows, of a step that is not all decodes"""


class DeviceBatch(SlotFacts):
    """Tokens and block tables of every slot on the device; a plan's changes alone are sent.

    Drawn tokens are written where the next step reads its input, so a step can be queued before anybody on
    the host knows what the one before has drawn.

    One slot more than there are belongs to nobody: rows that only fill a captured batch are its.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        super().__init__()
        self.block_size = block_size
        self.device = device
        self.idle_slot = num_slots
        # One more than the model's length: the last token of a full sequence is drawn, never computed.
        self._width = max_model_len + 1
        self.max_blocks = -(-max_model_len // block_size)
        self.tokens = torch.zeros(num_slots + 1, self._width, dtype=torch.int32, device=device)
        self.tables = torch.zeros(num_slots + 1, self.max_blocks, dtype=torch.int32, device=device)
        self._flat_tokens = self.tokens.view(-1)
        self._flat_tables = self.tables.view(-1)
        self._num_blocks = [0] * num_slots

    def set_scratch(self, block: int) -> None:
        """Gives the idle slot its only block, which must belong to nobody either."""
        self.tables[self.idle_slot].fill_(block)

    # ---------------------------------------------------------------- sending

    def note(self, plan: StepPlan) -> None:
        """Takes over what is wanted of the plan's new slots; before anything else of the plan."""
        for new in plan.new:
            self.take(new)
        for fork in plan.forks:
            self.forget(fork.slot)

    def pack(self, plan: StepPlan, upload: Upload, padded: int | None) -> Sections:
        """Adds what the plan changes and computes to the upload, the rows first.

        padded: how many rows a captured batch has, of a plan that only decodes and is to be one.
        """
        parts = Sections()
        slots = np.array(plan.slots, dtype=np.int64)
        starts = np.array(plan.starts, dtype=np.int64)
        counts = np.array(plan.counts, dtype=np.int64)
        if padded is not None:
            filled = np.full(padded, self.idle_slot, dtype=np.int64), np.zeros(padded, dtype=np.int64)
            filled[0][: len(slots)], filled[1][: len(slots)] = slots, starts
            parts.slots, parts.positions = upload.add(filled[0]), upload.add(filled[1])
        elif plan.num_tokens == len(slots):
            parts.slots, parts.positions = upload.add(slots), upload.add(starts)
        else:
            query_start = np.zeros(len(slots) + 1, dtype=np.int64)
            np.cumsum(counts, out=query_start[1:])
            positions = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], counts)
            parts.slots, parts.positions = upload.add(np.repeat(slots, counts)), upload.add(positions)
            parts.rows = (
                upload.add(slots),
                upload.add((starts + counts).astype(np.int32)),
                upload.add(query_start.astype(np.int32)),
            )
        self._pack_changes(plan, upload, parts)
        if plan.samples:
            rows = [row for row, _ in plan.samples]
            owners = np.array([slot for _, slot in plan.samples], dtype=np.int64)
            parts.ends = upload.add(owners * self._width + (starts + counts)[rows])
        return parts

    def _pack_changes(self, plan: StepPlan, upload: Upload, parts: Sections) -> None:
        for new in plan.new:
            ids, blocks = (np.array(each, dtype=np.int32) for each in (new.token_ids, new.block_ids))
            self._num_blocks[new.slot] = len(blocks)
            parts.new.append((new.slot, upload.add(ids), len(ids), upload.add(blocks), len(blocks)))
        for index, fork in enumerate(plan.forks):
            self._num_blocks[fork.slot] = len(fork.block_ids)
            parts.forks.append((index, upload.add(np.array(fork.block_ids, dtype=np.int32))))
        if plan.chosen:
            places = np.array([slot * self._width + at for slot, at, _ in plan.chosen], dtype=np.int64)
            chosen = np.array([token for _, _, token in plan.chosen], dtype=np.int32)
            parts.chosen = upload.add(places), upload.add(chosen)
        # By place: the device writes them in no order.
        changed: dict[int, int] = {}
        for slot, taken in plan.new_blocks:
            first = slot * self.max_blocks + self._num_blocks[slot]
            self._num_blocks[slot] += len(taken)
            changed.update(zip(range(first, first + len(taken)), taken, strict=True))
        for slot, index, block in plan.replaced_blocks:
            changed[slot * self.max_blocks + index] = block
        if changed:
            places = np.fromiter(changed.keys(), dtype=np.int64, count=len(changed))
            blocks = np.fromiter(changed.values(), dtype=np.int32, count=len(changed))
            parts.tables = upload.add(places), upload.add(blocks)

    def apply(self, plan: StepPlan, parts: Sections, upload: Upload) -> None:
        """Takes over new sequences, forks, chosen tokens and table changes, in the plan's order."""
        for slot, ids, num_ids, blocks, num_blocks in parts.new:
            self.tokens[slot, :num_ids].copy_(upload[ids])
            self.tables[slot, :num_blocks].copy_(upload[blocks])
        for index, blocks in parts.forks:
            fork = plan.forks[index]
            parent = self.tokens[fork.parent_slot, : fork.num_tokens]
            self.tokens[fork.slot, : fork.num_tokens].copy_(parent)
            self.tables[fork.slot, : len(fork.block_ids)].copy_(upload[blocks])
        if parts.chosen is not None:
            self._flat_tokens.index_copy_(0, upload[parts.chosen[0]], upload[parts.chosen[1]])
        if parts.tables is not None:
            self._flat_tables.index_copy_(0, upload[parts.tables[0]], upload[parts.tables[1]])

    # ---------------------------------------------------------------- computing

    def decode_inputs(
        self,
        slots: torch.Tensor,
        positions: torch.Tensor,
        query_start: torch.Tensor,
        longest: int,
        *,
        graph: bool = False,
        lengths: list[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        """Token ids ``[B]``, positions and metadata of rows that compute one token each.

        slots, positions: int64 ``[B]``; query_start: int32 ``[B + 1]``. longest: bound of the sequences'
        lengths. lengths: those, where the host knows them.
        """
        rows = len(slots)
        width = -(-longest // self.block_size)
        tables = self.tables[:, :width].index_select(0, slots)
        metadata = AttentionMetadata(
            query_start=query_start,
            seq_lens=(positions + 1).to(torch.int32),
            block_tables=tables,
            slot_mapping=self._mapping(slots, positions),
            max_query_len=1,
            max_seq_len=longest,
            num_decode_rows=rows,
            query_start_host=list(range(rows + 1)),
            seq_lens_host=[] if lengths is None else lengths,
            graph=graph,
        )
        return self._ids(slots, positions), positions, metadata

    def inputs(self, plan: StepPlan, parts: Sections, upload: Upload) -> ModelInputs:
        """Token ids, positions and attention metadata of the plan's rows."""
        slots, positions = upload[parts.slots], upload[parts.positions]
        ends = np.cumsum(plan.counts)
        lengths = [start + count for start, count in zip(plan.starts, plan.counts, strict=True)]
        longest = max(lengths)
        if parts.rows is None:
            query_start = torch.arange(len(plan.slots) + 1, dtype=torch.int32, device=self.device)
            ids, positions, metadata = self.decode_inputs(
                slots, positions, query_start, longest, lengths=lengths
            )
            return ModelInputs(ids, positions, metadata, ends - 1)
        rows, seq_lens, query_start = (upload[each] for each in parts.rows)
        longer = [index for index, count in enumerate(plan.counts) if count > 1]
        metadata = AttentionMetadata(
            query_start=query_start,
            seq_lens=seq_lens,
            block_tables=self.tables[:, : -(-longest // self.block_size)].index_select(0, rows),
            slot_mapping=self._mapping(slots, positions),
            max_query_len=max(plan.counts),
            max_seq_len=longest,
            num_decode_rows=len(plan.slots) - 1 - longer[-1],
            query_start_host=[0, *ends.tolist()],
            seq_lens_host=lengths,
        )
        return ModelInputs(self._ids(slots, positions), positions, metadata, ends - 1)

    def _ids(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._flat_tokens.index_select(0, slots * self._width + positions).long()

    def _mapping(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        places = slots * self.max_blocks + positions // self.block_size
        blocks = self._flat_tables.index_select(0, places).long()
        return blocks * self.block_size + positions % self.block_size

    def store_drawn(self, parts: Sections, upload: Upload, token_ids: torch.Tensor) -> None:
        """Appends drawn tokens (int64 ``[S]``, parallel to the plan's samples) to their slots."""
        if parts.ends is not None:
            self._flat_tokens.index_copy_(0, upload[parts.ends], token_ids.to(torch.int32))

    def history(self, slots: torch.Tensor, longest: int) -> torch.Tensor:
        """The first ``longest`` tokens of slots (int64 ``[R]``), int64 ``[R, longest]``; what lies past a
        sequence's end is arbitrary, but some token."""
        return self.tokens[:, :longest].index_select(0, slots).long()
