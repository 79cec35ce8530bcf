"""Whether a scheduler's books agree with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aserve.core.waiting import order

if TYPE_CHECKING:
    from aserve.core.beam_state import BeamState
    from aserve.core.scheduler import Scheduler
    from aserve.core.sequence import SequenceGroup


def verify(scheduler: Scheduler, free_slots: list[int]) -> None:
    """Raises RuntimeError if blocks, slots, queues and counts do not add up."""
    groups = list(scheduler.groups.values())
    running, waiting, limits = scheduler.running, scheduler.waiting, scheduler.limits
    live = [seq for group in groups for seq in group.unfinished]
    scheduler.blocks.verify(live)
    scheduler.ledger.verify(len(groups))
    held = [seq.slot for seq in live if seq.slot >= 0]
    held += [slot for group in groups for slot in group.reserved_slots]
    if sorted(held + free_slots) != list(range(limits.max_num_seqs)):
        raise RuntimeError("worker slots are not exactly partitioned between sequences and the free list")
    queued = {id(group) for group in running} | {id(group) for group in waiting}
    if queued != {id(group) for group in groups}:
        raise RuntimeError("a request is in no queue, or a finished one is still queued")
    if len(running) + len(waiting) != len(queued):
        raise RuntimeError("a request is queued twice")
    if waiting.num_prompt_tokens != sum(group.num_prompt_tokens for group in waiting):
        raise RuntimeError("the prompts that wait were counted wrongly")
    if sorted(running, key=order) != running:
        raise RuntimeError("running requests are out of order")
    if scheduler.num_swapped != sum(group.swapped for group in waiting) or any(g.swapped for g in running):
        raise RuntimeError("swapped requests were counted wrongly")
    for group in groups:
        if group.beam is not None:
            _verify_beams(group, group.beam)
    for seq in live:
        if not 0 <= seq.num_computed <= seq.num_known:
            raise RuntimeError(f"sequence {seq.seq_id} has computed more tokens than it knows")
        if seq.slot >= 0 and len(seq.blocks) * limits.block_size < seq.num_computed:
            raise RuntimeError(f"sequence {seq.seq_id} has computed tokens without blocks")
        if seq.slot < 0 and (seq.blocks or (seq.num_computed and not seq.group.swapped)):
            raise RuntimeError(f"waiting sequence {seq.seq_id} still holds blocks")
        if bool(seq.swapped_blocks) > seq.group.swapped:
            raise RuntimeError(f"sequence {seq.seq_id} holds swap space while it runs")


def _verify_beams(group: SequenceGroup, state: BeamState) -> None:
    beams = [*group.seqs, *state.parked]
    if not 1 <= len(beams) <= group.width or len({tuple(beam.token_ids) for beam in beams}) != len(beams):
        raise RuntimeError(f"request {group.request_id!r} has too many beams, none, or one twice")
    if any(
        beam.slot >= 0 or beam.blocks or beam.swapped_blocks or beam.num_computed for beam in state.parked
    ):
        raise RuntimeError(f"a parked beam of request {group.request_id!r} holds something")
    if {len(beam.token_ids) for beam in beams} != {group.num_prompt_tokens + state.search.length}:
        raise RuntimeError(f"the beams of request {group.request_id!r} are not of one length")
    if group.seqs[0].slot >= 0 and len(group.seqs) + len(group.reserved_slots) != group.width:
        raise RuntimeError(f"request {group.request_id!r} does not have a slot for each of its beams")
