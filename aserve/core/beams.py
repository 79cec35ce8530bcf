"""Beam search among sequences: who goes on, who is forked, who is dropped, and what happens to their blocks.

A beam is a sequence whose next token is chosen by comparing it with the other beams of its request. So
it is never scheduled ahead of its results: all its known tokens are computed until the results of all
beams are here. They need not be computed in one step, though usually they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from aserve.core.beam import Beam, Candidate
from aserve.core.beam_state import BeamState, Trail
from aserve.core.changes import Commit
from aserve.core.issue import PlanIssuer
from aserve.core.plan import Ticket
from aserve.core.sequence import Sequence, SequenceGroup, SequenceStatus
from aserve.errors import RequestFailedError
from aserve.messages.step import SampleLogprobs, StepResult

if TYPE_CHECKING:
    from aserve.core.scheduler import Scheduler

Ending = tuple[SequenceStatus, int | str | None]


class BeamKeeper:
    """Moves the beams of a scheduler's requests. ``retire`` forgets a request that has ended."""

    def __init__(self, scheduler: Scheduler, issuer: PlanIssuer, retire: Callable[[Sequence], None]) -> None:
        self._scheduler = scheduler
        self._blocks = scheduler.blocks
        self._issuer = issuer
        self._retire = retire

    # ---------------------------------------------------------------- results

    def commit(self, ticket: Ticket, result: StepResult, changes: Commit) -> None:
        """Takes in what a step found for beams, which are the last of its samples."""
        self._issuer.beams_in_flight -= len(ticket.beams)
        failed, details = result.failed or {}, result.details or {}
        for index, seq in enumerate(ticket.beams, len(ticket.samples)):
            group, state = seq.group, _state(seq.group)
            state.in_flight -= 1
            if group.finished:
                continue
            if index in failed:
                self._fail(group, failed[index], changes)
                continue
            state.reports[seq] = details[index]
            changes.beam_tokens += 1
            if self._holds(group) and state.parked:
                if all(each in state.reports and _computed(each) for each in group.seqs):
                    self._bring_back(group)
            elif all(each in state.reports for each in (*group.seqs, *state.parked)):
                self._advance(group, changes)

    def _holds(self, group: SequenceGroup) -> bool:
        """Whether the request runs, or waits in swap space; otherwise it has nothing but its tokens."""
        return group.swapped or group.seqs[0].status is SequenceStatus.RUNNING

    def _fail(self, group: SequenceGroup, reason: str, changes: Commit) -> None:
        for sibling in group.unfinished:
            self._scheduler.finish(sibling, SequenceStatus.FINISHED_FAILED)
        changes.failed.append((group, reason))

    # ---------------------------------------------------------------- one step of the search

    def _advance(self, group: SequenceGroup, changes: Commit) -> None:
        state = _state(group)
        beams = sorted((*group.seqs, *state.parked), key=lambda seq: seq.index)
        reports = [state.reports.pop(seq) for seq in beams]
        endings: dict[Candidate, Ending] = {}

        def ends(candidate: Candidate) -> bool:
            ending = self._ending(group, beams[candidate.parent], candidate.token_id)
            if ending is not None:
                endings[candidate] = ending
            return ending is not None

        def keep(candidate: Candidate) -> Sequence:
            parent = beams[candidate.parent]
            seq = self._hypothesis(parent, [candidate.token_id], candidate.total, *endings[candidate])
            state.trails[seq] = _trail(state, parent, candidate, reports[candidate.parent])
            return seq

        rows = [
            Beam(seq.cumulative_logprob, report.top_ids, report.top_logprobs)
            for seq, report in zip(beams, reports, strict=True)
        ]
        try:
            chosen = state.search.advance(rows, ends, keep)
        except RequestFailedError as error:  # its text could not be made
            self._fail(group, str(error), changes)
            return
        if state.search.done:
            self._finish(group)
        else:
            self._go_on(group, beams, reports, chosen)
        changes.beams.append(group)

    def _ending(self, group: SequenceGroup, beam: Sequence, token_id: int) -> Ending | None:
        """How a beam ends that goes on with that token; None if it does not. As ``check_stop`` has it,
        with the stop strings that are looked for elsewhere there."""
        params, state = group.params, _state(group)
        length = len(beam.token_ids) + 1
        if length - beam.num_prompt_tokens >= params.min_tokens:
            if token_id == group.eos_token_id and not params.ignore_eos:
                return SequenceStatus.FINISHED_STOPPED, None
            if token_id in group.stop_ids:
                return SequenceStatus.FINISHED_STOPPED, token_id
        if state.watch is not None:
            found = state.watch.look(beam, token_id)
            if found is not None:
                return SequenceStatus.FINISHED_STOPPED, found
        if length >= group.max_known:
            return SequenceStatus.FINISHED_LENGTH, None
        return None

    def _go_on(
        self,
        group: SequenceGroup,
        beams: list[Sequence],
        reports: list[SampleLogprobs],
        chosen: list[Candidate],
    ) -> None:
        """Gives the chosen candidates their sequences.

        The first one of a beam takes its sequence over, further ones fork it, and a beam without any is
        dropped. Nothing of the request is in flight, so the blocks and slots of what is dropped can be
        given away at once, as in ``Scheduler._retire``.
        """
        state, holds = _state(group), self._holds(group)
        first: dict[int, int] = {}
        for place, candidate in enumerate(chosen):
            first.setdefault(candidate.parent, place)
        for index, beam in enumerate(beams):
            if index not in first:
                self._drop(beam)
        running: list[Sequence] = []
        for place, candidate in enumerate(chosen):
            parent = beams[candidate.parent]
            # Forks come before any token is appended: a child must not have its parent's next token.
            running.append(parent if first[candidate.parent] == place else self._fork(parent))
        if state.watch is not None:
            parents = [beams[each.parent] for each in chosen]
            state.watch.follow(list(zip(running, parents, (each.token_id for each in chosen), strict=True)))
        trails = [_trail(state, beams[each.parent], each, reports[each.parent]) for each in chosen]
        for index, (seq, candidate) in enumerate(zip(running, chosen, strict=True)):
            state.trails[seq] = trails[index]
            seq.index = index
            seq.token_ids.append(candidate.token_id)
            seq.cumulative_logprob = candidate.total
            self._blocks.publish(seq)
        self._issuer.chosen += running
        if holds:
            group.seqs = running
        else:
            group.seqs, state.parked = running[:1], running[1:]

    def _fork(self, parent: Sequence) -> Sequence:
        child = parent.fork(self._issuer.new_seq_id(), parent.index)
        self._blocks.share(child)
        if parent.slot >= 0:
            child.slot = parent.group.reserved_slots.pop()
            self._issuer.branches.append((child, parent))
        return child

    def _drop(self, beam: Sequence) -> None:
        group = beam.group
        self._blocks.release(beam)
        beam.status = SequenceStatus.FINISHED_STOPPED
        _state(group).trails.pop(beam, None)
        if beam.slot >= 0:
            group.reserved_slots.append(beam.slot)
            beam.slot = -1

    # ---------------------------------------------------------------- the end

    def end(self, group: SequenceGroup) -> None:
        """Ends a request that has outgrown the cache: its beams are hypotheses as they stand."""
        state = _state(group)
        for beam in (*group.seqs, *state.parked):
            state.search.end(beam.cumulative_logprob, partial(self._as_it_stands, beam))
        self._finish(group)

    def _as_it_stands(self, beam: Sequence) -> Sequence:
        seq = self._hypothesis(beam, [], beam.cumulative_logprob, SequenceStatus.FINISHED_LENGTH, None)
        trails = _state(beam.group).trails
        trails[seq] = trails.get(beam)
        return seq

    def _finish(self, group: SequenceGroup) -> None:
        """Makes the hypotheses the request's sequences and lets go of the beams."""
        state = _state(group)
        for beam in group.seqs:
            self._drop(beam)
        outputs = [hypothesis.content for hypothesis in state.search.hypotheses]
        for index, seq in enumerate(outputs):
            seq.index = index
        group.seqs, state.parked = outputs, []
        state.reports.clear()
        self._retire(outputs[0])

    def _hypothesis(
        self,
        beam: Sequence,
        last: list[int],
        total: float,
        status: SequenceStatus,
        stop_reason: int | str | None,
    ) -> Sequence:
        """A sequence that has ended, and holds nothing."""
        seq = Sequence(self._issuer.new_seq_id(), 0, beam.group, beam.token_ids + last)
        seq.cumulative_logprob = total
        seq.status, seq.stop_reason = status, stop_reason
        return seq

    # ---------------------------------------------------------------- preemption

    def park(self, group: SequenceGroup) -> None:
        """Takes apart a request that has just given up all its blocks: it comes back with one beam."""
        state = _state(group)
        beams = sorted((*group.seqs, *state.parked), key=lambda seq: seq.index)
        group.seqs, state.parked = beams[:1], beams[1:]

    def parked_need(self, group: SequenceGroup) -> int:
        """Blocks that parked beams will take up, beside those they share, once they are computed."""
        state, needed = _state(group), 0
        for place, beam in enumerate(state.parked):
            shared = max(_common(beam, other) for other in (*group.seqs, *state.parked[:place]))
            needed += self._blocks.blocks_for(beam.num_known) - shared // self._blocks.block_size
        return needed

    def _bring_back(self, group: SequenceGroup) -> None:
        """Has the next parked beam share blocks with the one that is most like it of those that are back.

        All of their tokens are computed, or will have been before any plan that is made from now on.
        """
        state = _state(group)
        beam = state.parked.pop(0)
        state.reports.pop(beam, None)
        like = max(group.seqs, key=lambda other: _common(beam, other))
        shared = _common(beam, like)
        beam.num_computed = shared
        beam.blocks, beam.swapped_blocks = list(like.blocks), list(like.swapped_blocks)
        beam.num_published = min(like.num_published, shared // self._blocks.block_size)
        self._blocks.share(beam)
        beam.status = like.status
        if like.slot >= 0:
            beam.slot = group.reserved_slots.pop()
            self._issuer.unsent.append(beam)
        group.seqs.append(beam)


def _state(group: SequenceGroup) -> BeamState:
    if group.beam is None:
        raise RuntimeError(f"request {group.request_id!r} has no beams")
    return group.beam


def _computed(seq: Sequence) -> bool:
    return seq.num_computed == len(seq.token_ids)


def _common(one: Sequence, other: Sequence) -> int:
    """How many first tokens are the same."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(one.token_ids))


def _trail(state: BeamState, parent: Sequence, candidate: Candidate, report: SampleLogprobs) -> Trail | None:
    """The parent's log-probabilities and those of the candidate, if asked for."""
    count = parent.group.params.logprobs
    if count is None:
        return None
    own = report.top_logprobs[candidate.rank]
    rank = report.top_logprobs.index(own) + 1
    details = SampleLogprobs(own, rank, report.top_ids[:count], report.top_logprobs[:count])
    return Trail(state.trails.get(parent), details)
