"""Which tokens run next.

There is no prefill phase and no decode phase. A sequence knows some tokens and has computed some of
them; a step computes a part of the difference. A sequence whose last known token is computed draws
its next one. Whole prompts, chunks of prompts, recomputation after a preemption and single-token
decoding are the same case with different counts.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from aserve.core.block_manager import BlockManager
from aserve.core.plan import PlanBuilder, Ticket, describe_fork
from aserve.core.sequence import Sequence, SequenceGroup, SequenceStatus
from aserve.messages.step import Fork, SampleLogprobs, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What the scheduler may use.

    max_num_batched_tokens: tokens of one step.
    max_num_seqs: sequences running at once; also the number of worker slots.
    chunked_prefill: mix chunks of prompts with decodes instead of running whole prompts first.
    delay_factor: with something running, the oldest waiting prompt waits this many times the
        duration of the last prompt step.
    """

    num_blocks: int
    block_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    chunked_prefill: bool = False
    delay_factor: float = 0.0


@dataclass(slots=True)
class TokenUpdate:
    """One drawn token, already appended to its sequence."""

    seq: Sequence
    token_id: int
    logprob: float
    details: SampleLogprobs | None


@dataclass(slots=True)
class Commit:
    """What a finished step changed, in the order it is to be told."""

    tokens: list[TokenUpdate] = field(default_factory=list)
    failed: list[tuple[SequenceGroup, str]] = field(default_factory=list)


class Scheduler:
    """Owns every unfinished request, its blocks and its worker slots."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.blocks = BlockManager(limits.num_blocks, limits.block_size)
        self.waiting: deque[SequenceGroup] = deque()
        self.running: list[SequenceGroup] = []
        self.groups: dict[str, SequenceGroup] = {}
        self.num_preemptions = 0
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._unsent: list[Sequence] = []
        self._watermark = limits.num_blocks // 100
        self._next_seq_id = 0
        self._next_step_id = 0
        self._last_prompt_duration = 0.0
        self._capped: list[Sequence] = []

    # ---------------------------------------------------------------- requests in and out

    def add(self, group: SequenceGroup) -> bool:
        """Queues a request. False if its prompt can never fit: it is then finished as ignored.

        KeyError when an unfinished request has the same id.
        """
        if group.request_id in self.groups:
            raise KeyError(f"request id {group.request_id!r} already exists")
        if not 1 <= group.width <= self.limits.max_num_seqs:
            raise ValueError(
                f"best_of={group.width} exceeds max_num_seqs={self.limits.max_num_seqs}; "
                "it could never be scheduled"
            )
        seq = Sequence(self._new_seq_id(), 0, group, list(group.prompt_token_ids))
        group.seqs = [seq]
        length = group.num_prompt_tokens
        limit = group.max_model_len
        if not self.limits.chunked_prefill:
            limit = min(limit, self.limits.max_num_batched_tokens)
        if length > limit or self.blocks.blocks_for(length) > self.limits.num_blocks:
            seq.status = SequenceStatus.FINISHED_IGNORED
            return False
        self.groups[group.request_id] = group
        self.waiting.append(group)
        return True

    def abort(self, request_id: str) -> SequenceGroup | None:
        """Ends a request at once and frees what it held; None if there is no such request."""
        group = self.groups.get(request_id)
        if group is None:
            return None
        for seq in group.unfinished:
            self.finish(seq, SequenceStatus.FINISHED_ABORTED)
        return group

    def finish(self, seq: Sequence, status: SequenceStatus, stop_reason: int | str | None = None) -> None:
        """Ends one sequence for a reason found outside (stop string, abort, failure)."""
        if seq.finished:
            return
        seq.status = status
        seq.stop_reason = stop_reason
        self._retire(seq)

    @property
    def num_unfinished(self) -> int:
        return len(self.groups)

    def take_capped(self) -> list[Sequence]:
        """Sequences that ended since the last call because the whole cache is too small for them."""
        capped, self._capped = self._capped, []
        return capped

    # ---------------------------------------------------------------- the decision

    def schedule(self, now: float = 0.0) -> StepPlan | None:
        """Decides the next step; None when nothing can run before an issued plan is committed."""
        step = PlanBuilder(self.limits.max_num_batched_tokens)
        if self.limits.chunked_prefill:
            if not self._run_running(step):
                self._admit(step, now)
        else:
            for group in self.running:
                for seq in group.seqs:
                    if seq.num_known - seq.num_computed > 1 and not seq.finished:
                        self._try_row(step, seq)
            self._admit(step, now)
            if not step.rows:
                self._run_running(step)
        if not step.rows:
            return None
        return self._make_plan(step, now)

    def commit(self, plan: StepPlan, result: StepResult, now: float = 0.0) -> Commit:
        """Applies a finished step: appends tokens, ends sequences, frees what they held.

        Plans are committed in the order they were scheduled. Tokens drawn for a sequence that ended
        while its step was in flight are dropped.
        """
        ticket: Ticket = plan.ticket
        if ticket.prefilled:
            self._last_prompt_duration = now - ticket.started
        changes = Commit()
        for row, entries in (result.prompt_logprobs or {}).items():
            # Entry i is about token starts[row] + 1 + i; a recomputed prompt brings some a second time.
            have = ticket.rows[row].group.prompt_logprobs
            have.extend(entries[len(have) - plan.starts[row] :])
        failed = result.failed or {}
        details = result.details or {}
        for index, seq in enumerate(ticket.samples):
            seq.in_flight -= 1
            if seq.status >= SequenceStatus.FINISHED_STOPPED:
                continue
            group = seq.group
            if index in failed:
                for sibling in group.unfinished:
                    self.finish(sibling, SequenceStatus.FINISHED_FAILED)
                changes.failed.append((group, failed[index]))
                continue
            token = result.token_ids[index]
            seq.token_ids.append(token)
            logprob = result.logprobs[index]
            seq.cumulative_logprob += logprob
            group.check_stop(seq)
            if seq.status >= SequenceStatus.FINISHED_STOPPED:
                self._retire(seq)
            changes.tokens.append(TokenUpdate(seq, token, logprob, details.get(index)))
        return changes

    def verify(self) -> None:
        """Raises RuntimeError if blocks, slots and sequences do not add up. Meant for tests and idle."""
        live = [seq for group in self.groups.values() for seq in group.unfinished]
        self.blocks.pool.verify([seq.blocks for seq in live])
        held = [seq.slot for seq in live if seq.slot >= 0]
        held += [slot for group in self.groups.values() for slot in group.reserved_slots]
        if sorted(held + self._free_slots) != list(range(self.limits.max_num_seqs)):
            raise RuntimeError("worker slots are not exactly partitioned between sequences and the free list")
        queued = {id(group) for group in self.running} | {id(group) for group in self.waiting}
        if queued != {id(group) for group in self.groups.values()}:
            raise RuntimeError("a request is in no queue, or a finished one is still queued")
        if len(self.running) + len(self.waiting) != len(queued):
            raise RuntimeError("a request is queued twice")
        for seq in live:
            if not 0 <= seq.num_computed <= seq.num_known:
                raise RuntimeError(f"sequence {seq.seq_id} has computed more tokens than it knows")
            if seq.slot >= 0 and len(seq.blocks) * self.limits.block_size < seq.num_computed:
                raise RuntimeError(f"sequence {seq.seq_id} has computed tokens without blocks")
            if seq.slot < 0 and (seq.blocks or seq.num_computed):
                raise RuntimeError(f"waiting sequence {seq.seq_id} still holds blocks")

    # ---------------------------------------------------------------- running requests

    def _run_running(self, step: PlanBuilder) -> bool:
        """Rows for running requests, oldest first; True if somebody had to give way."""
        gave_way = False
        position = 0
        while position < len(self.running):
            group = self.running[position]
            todo = [seq for seq in group.seqs if self._has_work(seq)]
            while todo and not self._fits(todo, step):
                gave_way = True
                victim = self.running[-1]
                if len(self.running) == 1:
                    # Alone with the whole cache and still too large: nothing is left to wait for.
                    self._cap(todo.pop())
                else:
                    self._preempt(victim)
                    if victim is group:
                        return True
            for seq in todo:
                self._try_row(step, seq)
            if position < len(self.running) and self.running[position] is group:
                position += 1
        return gave_way

    def _has_work(self, seq: Sequence) -> bool:
        # At max_known the sequence ends with the token in flight; there is nothing to compute for it.
        known = len(seq.token_ids) + seq.in_flight
        return (
            seq.status < SequenceStatus.FINISHED_STOPPED
            and known > seq.num_computed
            and known < seq.max_known
        )

    def _fits(self, seqs: list[Sequence], step: PlanBuilder) -> bool:
        budget = step.budget
        needed = 0
        for seq in seqs:
            count = min(seq.num_known - seq.num_computed, budget)
            budget -= count
            if count > 0:
                needed += self.blocks.missing(seq, seq.num_computed + count)
        return needed <= self.blocks.num_free

    def _preempt(self, group: SequenceGroup) -> None:
        """Sends a running request back to the front of the queue; its tokens will be recomputed.

        Blocks may be handed out again in the plan being made: plans run in order, so a step in
        flight finishes its writes to them before any later plan touches them.
        """
        self.running.remove(group)
        self.num_preemptions += 1
        group.num_preemptions += 1
        for seq in group.unfinished:
            self._release(seq)
            seq.num_computed = 0
            seq.status = SequenceStatus.WAITING
        self._free_slots.extend(group.reserved_slots)
        group.reserved_slots = []
        self.waiting.appendleft(group)

    # ---------------------------------------------------------------- admission

    def _may_admit(self, now: float) -> bool:
        if self.limits.delay_factor <= 0 or not self.running:
            return True
        oldest = min(group.arrival_time for group in self.waiting)
        return now - oldest > self.limits.delay_factor * self._last_prompt_duration

    def _admit(self, step: PlanBuilder, now: float) -> None:
        """Moves waiting requests to running, first come first served, while they fit."""
        if not self.waiting or not self._may_admit(now):
            return
        while self.waiting and step.budget > 0:
            group = self.waiting[0]
            seqs = group.unfinished
            if any(seq.in_flight for seq in seqs):
                return  # preempted a moment ago: its last token is still on the way
            slots = group.width if not group.expanded else len(seqs)
            if slots > len(self._free_slots):
                return
            if not self.limits.chunked_prefill and seqs[0].num_known > step.budget:
                return
            needed = sum(self.blocks.blocks_for(seq.num_known) for seq in seqs)
            if needed > self.limits.num_blocks:
                self._cap(seqs[-1])
                continue
            spare = self.blocks.num_free - step.blocks_promised - needed
            if spare < (self._watermark if self.running else 0):
                return
            self.waiting.popleft()
            insort(self.running, group, key=_age)
            if group.first_scheduled_time is None:
                group.first_scheduled_time = now
            for seq in seqs:
                seq.slot = self._free_slots.pop()
                seq.status = SequenceStatus.RUNNING
                self._unsent.append(seq)
            group.reserved_slots = [self._free_slots.pop() for _ in range(slots - len(seqs))]
            for seq in seqs:
                self._try_row(step, seq)
                # The rest of it was counted as taken above: keep later arrivals of this step off it.
                step.blocks_promised += self.blocks.blocks_for(seq.num_known) - len(seq.blocks)

    def _cap(self, seq: Sequence) -> None:
        """Ends a sequence that has outgrown the whole cache; it keeps what it has generated."""
        self.finish(seq, SequenceStatus.FINISHED_LENGTH)
        self._capped.append(seq)

    # ---------------------------------------------------------------- rows and blocks

    def _try_row(self, step: PlanBuilder, seq: Sequence) -> None:
        """Adds the next tokens of ``seq`` to the step, as many as the token budget allows."""
        count = min(seq.num_known - seq.num_computed, step.budget)
        end = seq.num_computed + count
        if count <= 0 or self.blocks.missing(seq, end) > self.blocks.num_free:
            return
        step.add_row(seq, count, self.blocks.grow(seq, end))
        seq.num_computed = end

    def _release(self, seq: Sequence) -> None:
        self.blocks.release(seq)
        if seq.slot >= 0:
            self._free_slots.append(seq.slot)
            seq.slot = -1

    def _retire(self, seq: Sequence) -> None:
        """Frees what an ended sequence held, and forgets its request once all its sequences ended.

        A step in flight may still contain the sequence. Its blocks can be given away all the same:
        whoever gets them is in a plan that runs after that step, and the stray write lands beyond the
        sequence's last token, in a block nobody else reads before overwriting it.
        """
        self._release(seq)
        group = seq.group
        if group.request_id not in self.groups or not group.finished:
            return
        self._free_slots.extend(group.reserved_slots)
        group.reserved_slots = []
        del self.groups[group.request_id]
        if group in self.running:
            self.running.remove(group)
        else:
            self.waiting.remove(group)

    # ---------------------------------------------------------------- the plan

    def _make_plan(self, step: PlanBuilder, now: float) -> StepPlan:
        step.arrange()
        forks: list[Fork] = []
        samples: list[tuple[int, Sequence]] = []
        for row, (seq, _, _) in enumerate(step.rows):
            if seq.num_computed < seq.num_known:
                continue  # a chunk that leaves some of the prompt for later draws nothing
            seq.in_flight += 1
            samples.append((row, seq))
            if not seq.group.expanded:
                for child in self._expand(seq):
                    forks.append(describe_fork(child, seq))
                    samples.append((row, child))
        plan = step.build(self._next_step_id, now, samples, self._unsent, forks)
        self._unsent = []
        self._next_step_id += 1
        return plan

    def _expand(self, parent: Sequence) -> list[Sequence]:
        """Creates the other ``best_of`` sequences, when the prompt is computed for all of them."""
        group = parent.group
        group.expanded = True
        children = []
        for index in range(1, group.width):
            child = parent.fork(self._new_seq_id(), index)
            child.slot = group.reserved_slots.pop()
            self.blocks.share(child)
            children.append(child)
        group.seqs.extend(children)
        return children

    def _new_seq_id(self) -> int:
        self._next_seq_id += 1
        return self._next_seq_id


def _age(group: SequenceGroup) -> tuple[float, int]:
    return group.arrival_time, group.seqs[0].seq_id
