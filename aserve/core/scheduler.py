"""Which tokens run next.

There is no prefill phase and no decode phase. A sequence knows some tokens and has computed some of
them; a step computes a part of the difference. A sequence whose last known token is computed draws
its next one. Whole prompts, chunks of prompts, recomputation after a preemption and single-token
decoding are the same case with different counts.
"""

from __future__ import annotations

import math
from bisect import insort

from aserve.core import audit
from aserve.core.block_manager import BlockManager
from aserve.core.changes import Commit, Ledger, PrefixCounts, TokenUpdate
from aserve.core.issue import PlanIssuer
from aserve.core.limits import RECOMPUTE, SWAP, SchedulerLimits
from aserve.core.plan import PlanBuilder, Ticket
from aserve.core.sequence import Sequence, SequenceGroup, SequenceStatus
from aserve.core.waiting import Deadlines, WaitingQueue, order
from aserve.errors import QueueFullError
from aserve.messages.step import StepPlan, StepResult

__all__ = ["Commit", "Scheduler", "SchedulerLimits", "TokenUpdate"]


class Scheduler:
    """Owns every unfinished request, its blocks and its worker slots."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.blocks = BlockManager(
            limits.num_blocks,
            limits.block_size,
            prefix_caching=limits.prefix_caching,
            window=limits.window,
            num_swap_blocks=limits.num_swap_blocks,
            lookahead=limits.num_lookahead_slots,
        )
        self.waiting = WaitingQueue()
        self.running: list[SequenceGroup] = []
        self.groups: dict[str, SequenceGroup] = {}
        self.ledger = Ledger()
        self.prefix_counts = PrefixCounts()
        self.num_preemptions = 0
        self.num_swapped = 0
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._issuer = PlanIssuer(self.blocks)
        self._watermark = limits.num_blocks // 100
        self._last_prompt_duration = 0.0
        self._capped: list[Sequence] = []
        self._deadlines = Deadlines()
        self._expired: list[SequenceGroup] = []
        self.run_in_flight: int | None = None
        """Id of the issued plan of several steps; nothing is decided before its result is known."""

    # ---------------------------------------------------------------- requests in and out

    def check_room(self, num_prompt_tokens: int = 0, num_coming: int = 0) -> None:
        """Raises QueueFullError, and counts a rejection, if one more request is too many to wait.

        num_coming: requests that were let in and are not queued yet.
        """
        limits = self.limits
        try:
            self.waiting.check_room(
                limits.max_waiting_requests, limits.max_waiting_tokens, num_coming, num_prompt_tokens
            )
        except QueueFullError:
            self.ledger.received += 1
            self.ledger.rejected += 1
            raise

    def add(self, group: SequenceGroup) -> bool:
        """Queues a request. False if its prompt can never fit: it is then finished as ignored.

        KeyError when an unfinished request has the same id, QueueFullError when too many wait.
        """
        if group.request_id in self.groups:
            raise KeyError(f"request id {group.request_id!r} already exists")
        if not 1 <= group.width <= self.limits.max_num_seqs:
            raise ValueError(
                f"best_of={group.width} exceeds max_num_seqs={self.limits.max_num_seqs}; "
                "it could never be scheduled"
            )
        self.check_room(group.num_prompt_tokens)
        self.ledger.received += 1
        seq = Sequence(self._issuer.new_seq_id(), 0, group, list(group.prompt_token_ids))
        group.seqs = [seq]
        length = group.num_prompt_tokens
        limit = group.max_model_len
        if not self.limits.chunked_prefill:
            limit = min(limit, self.limits.max_num_batched_tokens)
        if length > limit or self.blocks.blocks_for(length) > self.limits.num_blocks:
            seq.status = SequenceStatus.FINISHED_IGNORED
            self.ledger.rejected += 1
            return False
        self.groups[group.request_id] = group
        self.waiting.push(group)
        self._deadlines.watch(group)
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

    @property
    def num_steps(self) -> int:
        """Steps issued so far."""
        return self._issuer.num_issued

    def take_capped(self) -> list[Sequence]:
        """Sequences that ended since the last call because the whole cache is too small for them."""
        capped, self._capped = self._capped, []
        return capped

    def take_expired(self) -> list[SequenceGroup]:
        """Requests that were given up since the last call because their deadline has passed."""
        expired, self._expired = self._expired, []
        return expired

    # ---------------------------------------------------------------- the decision

    def schedule(
        self,
        now: float = 0.0,
        max_steps: int = 1,
        seconds: float = math.inf,
        prompt_tokens: float = math.inf,
    ) -> StepPlan | None:
        """Decides the next step; None when nothing can run before an issued plan is committed.

        max_steps, seconds: where all rows decode greedily, the plan may hold as many steps, see
        :class:`StepPlan`. prompt_tokens: most tokens of prompts in the step, with chunked prefill.
        """
        if self.run_in_flight is not None:
            return None
        if self._deadlines:
            for group in self._deadlines.due(now):
                self.abort(group.request_id)
                self._expired.append(group)
        num_capped = len(self._capped)
        step = PlanBuilder(self.limits.max_num_batched_tokens)
        if self.limits.chunked_prefill:
            step.prompt_budget = prompt_tokens
            if not self._run_running(step):
                self._admit(step, now)
        else:
            for group in self.running:
                for seq in group.seqs:
                    if len(seq.token_ids) + seq.in_flight - seq.num_computed > 1 and not seq.finished:
                        self._try_row(step, seq)
            self._admit(step, now, swapped=False)
            if step.empty and not self._run_running(step):
                self._admit(step, now, prompts=False)
        if step.empty:
            # A sequence that was ended for its size has made room for others.
            if len(self._capped) > num_capped:
                return self.schedule(now, max_steps, seconds, prompt_tokens)
            return None
        if max_steps > 1 and not step.prefills:
            self._issuer.extend(step, max_steps, seconds)
        plan = self._issuer.issue(step, now)
        if plan.max_steps > 1:
            self.run_in_flight = plan.step_id
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now: float = 0.0) -> Commit:
        """Applies a finished step: appends tokens, ends sequences, frees what they held.

        Plans are committed in the order they were scheduled. Tokens drawn for a sequence that ended
        while its step was in flight are dropped.
        """
        ticket: Ticket = plan.ticket
        if ticket.prefilled:
            self._last_prompt_duration = now - ticket.started
        changes = Commit(prompt_tokens=ticket.prompt_tokens)
        for row, entries in (result.prompt_logprobs or {}).items():
            # Entry i is about token starts[row] + 1 + i; a recomputed prompt brings some a second time.
            have = ticket.rows[row].group.prompt_logprobs
            have.extend(entries[len(have) - plan.starts[row] :])
        caching, block_size = self.limits.prefix_caching, self.limits.block_size
        for index, vector in (result.pooled or {}).items():
            seq = ticket.samples[index]
            if not seq.finished:
                self.finish(seq, SequenceStatus.FINISHED_STOPPED)
                changes.pooled.append((seq.group, vector))
        failed = result.failed or {}
        details = result.details or {}
        samples = ticket.samples
        if plan.max_steps > 1:
            self.run_in_flight = None
            changes.steps = result.steps
            for seq in samples:
                seq.in_flight -= plan.max_steps - result.steps
                if seq.status < SequenceStatus.FINISHED_STOPPED:
                    seq.num_computed -= plan.max_steps - result.steps
            samples = samples * result.steps
        for index, seq in enumerate(samples):
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
            elif caching and (seq.num_published + 1) * block_size <= seq.num_computed:
                self.blocks.publish(seq)
            changes.tokens.append(TokenUpdate(seq, token, logprob, details.get(index)))
        if not self.groups and self.blocks.num_free != self.blocks.num_blocks:
            # Nobody is left who could hold a block. Cheap enough to ask always, and worth dying for.
            raise RuntimeError("KV blocks were lost: not all are free although no request is left")
        return changes

    def verify(self) -> None:
        """Raises RuntimeError if blocks, slots and sequences do not add up. Meant for tests and idle."""
        audit.verify(self, self._free_slots)

    # ---------------------------------------------------------------- running requests

    def _run_running(self, step: PlanBuilder) -> bool:
        """Rows for running requests, first in order first; True if somebody had to give way."""
        gave_way = False
        position = 0
        while position < len(self.running):
            group = self.running[position]
            if self._decode_in_place(step, group):
                position += 1
                continue
            todo = [seq for seq in group.seqs if self._has_work(seq)]
            for seq in todo:
                self.blocks.slide(seq)
            while todo and not self._fits(todo, step):
                if len(self.running) == 1:
                    # Alone with the whole cache and still too large: nothing is left to wait for.
                    self._cap(todo.pop())
                    continue
                gave_way = True
                if self._preempt_last() is group:
                    return True
            for seq in todo:
                self._try_row(step, seq)
            if position < len(self.running) and self.running[position] is group:
                position += 1
        return gave_way

    def _decode_in_place(self, step: PlanBuilder, group: SequenceGroup) -> bool:
        """Adds the row of a request that computes one token in a block it has: what nearly all do."""
        seq = group.seqs[0]
        start = seq.num_computed
        blocks = self.blocks
        if (
            len(group.seqs) > 1
            or len(seq.token_ids) + seq.in_flight != start + 1
            or start + 1 >= seq.max_known
            or start < seq.num_prompt_tokens
            or not start % blocks.block_size
            or blocks.pool.refs(seq.blocks[-1]) > 1
            or not blocks.simple
            or step.budget < 1
        ):
            return False
        step.budget -= 1
        step.decodes.append((seq, start, 1))
        seq.num_computed = start + 1
        return True

    def _has_work(self, seq: Sequence) -> bool:
        # At max_known the sequence ends with the token in flight; there is nothing to compute for it.
        known = len(seq.token_ids) + seq.in_flight
        return (
            seq.status < SequenceStatus.FINISHED_STOPPED
            and known > seq.num_computed
            and known < seq.max_known
        )

    def _fits(self, seqs: list[Sequence], step: PlanBuilder) -> bool:
        budget, prompt_budget = step.budget, step.prompt_budget
        needed = 0
        for seq in seqs:
            count = min(seq.num_known - seq.num_computed, budget)
            if count > 1:
                count = int(min(count, prompt_budget))
                prompt_budget -= count
            budget -= count
            if count > 0:
                needed += self.blocks.missing(seq, seq.num_computed + count)
        return needed <= self.blocks.num_free

    def _preempt_last(self) -> SequenceGroup:
        """Sends the last running request back to the queue: its tokens will be recomputed, or its blocks
        are moved to host memory.

        Blocks may be handed out again in the plan being made: plans run in order, so a step in flight
        finishes its reads and writes before any later plan touches them, and a plan moves blocks out
        before it does anything else with them.
        """
        group = self.running.pop()
        self.num_preemptions += 1
        group.num_preemptions += 1
        seqs = group.unfinished
        for seq in seqs:
            self.blocks.slide(seq)
        mode = self.limits.preemption_mode or (SWAP if group.width > 1 else RECOMPUTE)
        moved = self.blocks.swap_out(seqs) if mode == SWAP else None
        if moved is not None:
            group.swapped = True
            self.num_swapped += 1
            self._issuer.move_out(moved)
        for seq in seqs:
            self._release_slot(seq)
            seq.status = SequenceStatus.WAITING
            if moved is None:
                self.blocks.release(seq)
                seq.num_computed = 0
        self._release_reserved(group)
        self.waiting.push(group)
        return group

    # ---------------------------------------------------------------- admission

    def _admit(self, step: PlanBuilder, now: float, *, prompts: bool = True, swapped: bool = True) -> None:
        """Moves waiting requests to running, in order and without overtaking, while they fit.

        prompts, swapped: whether those that compute their prompt, or that were swapped out, may start.
        """
        while step.budget > 0 and step.prompt_budget > 0 and (group := self.waiting.head) is not None:
            seqs = group.unfinished
            if any(seq.in_flight for seq in seqs):
                return  # preempted a moment ago: its last token is still on the way
            if not (swapped if group.swapped else prompts and self._may_admit(group, now)):
                return
            slots = group.width if not group.expanded else len(seqs)
            if slots > len(self._free_slots):
                return
            found: list[list[int]] = []
            if group.swapped:
                total = needed = self.blocks.swap_need(seqs)
            else:
                found = [self.blocks.match(seq) for seq in seqs]
                skipped = len(found[0]) * self.limits.block_size
                if not self.limits.chunked_prefill and seqs[0].num_known - skipped > step.budget:
                    return
                total, needed = self.blocks.start_need(seqs, found)
            if total > self.limits.num_blocks:
                self._cap(seqs[-1])
                continue
            spare = self.blocks.num_free - step.blocks_promised - needed
            if spare < (self._watermark if self.running else 0):
                return
            self._start(group, seqs, slots, now)
            if group.swapped:
                group.swapped = False
                self.num_swapped -= 1
                step.swap_ins += self.blocks.swap_in(seqs)
            else:
                # All of it is held before anything is allocated, which might evict what was found.
                for seq, blocks in zip(seqs, found, strict=True):
                    self.blocks.adopt(seq, blocks)
            if group.first_scheduled_time is None:
                group.first_scheduled_time = now
                self._count_cached(group, step)
            for seq in seqs:
                self._try_row(step, seq)
                # The rest of it was counted as taken above: keep later arrivals of this step off it.
                step.blocks_promised += self.blocks.missing(seq, seq.num_known)

    def _may_admit(self, group: SequenceGroup, now: float) -> bool:
        factor = self.limits.delay_factor
        return (
            factor <= 0 or not self.running or now - group.arrival_time > factor * self._last_prompt_duration
        )

    def _start(self, group: SequenceGroup, seqs: list[Sequence], slots: int, now: float) -> None:
        """Takes the head of the queue in among the running."""
        self.waiting.remove(group)
        insort(self.running, group, key=order)
        for seq in seqs:
            seq.slot = self._free_slots.pop()
            seq.status = SequenceStatus.RUNNING
            self._issuer.unsent.append(seq)
        group.reserved_slots = [self._free_slots.pop() for _ in range(slots - len(seqs))]

    def _count_cached(self, group: SequenceGroup, step: PlanBuilder) -> None:
        group.num_cached_tokens = group.seqs[0].num_computed
        if not self.limits.prefix_caching or group.wants_prompt_logprobs:
            return
        step.cached_tokens += group.num_cached_tokens
        self.prefix_counts.queries += group.num_prompt_tokens
        self.prefix_counts.hits += group.num_cached_tokens

    def _cap(self, seq: Sequence) -> None:
        """Ends a sequence that has outgrown the whole cache; it keeps what it has generated."""
        self.finish(seq, SequenceStatus.FINISHED_LENGTH)
        self._capped.append(seq)

    # ---------------------------------------------------------------- rows and blocks

    def _try_row(self, step: PlanBuilder, seq: Sequence) -> None:
        """Adds the next tokens of ``seq`` to the step, as many as the token budget allows."""
        count = min(seq.num_known - seq.num_computed, step.budget)
        if count > 1:
            count = int(min(count, step.prompt_budget))
        end = seq.num_computed + count
        if count <= 0 or self.blocks.missing(seq, end) > self.blocks.num_free:
            return
        step.add_row(seq, count, self.blocks.grow(seq, end))
        seq.num_computed = end

    def _release_slot(self, seq: Sequence) -> None:
        if seq.slot >= 0:
            self._free_slots.append(seq.slot)
            seq.slot = -1

    def _release_reserved(self, group: SequenceGroup) -> None:
        self._free_slots.extend(group.reserved_slots)
        group.reserved_slots = []

    def _retire(self, seq: Sequence) -> None:
        """Frees what an ended sequence held, and forgets its request once all its sequences ended.

        A step in flight may still contain the sequence. Its blocks can be given away all the same:
        whoever gets them is in a plan that runs after that step, and the stray write lands beyond the
        sequence's last token, in a block nobody else reads before overwriting it; or it is part of what
        the block can be found by, see ``BlockManager.publish``.
        """
        self.blocks.release(seq)
        self._release_slot(seq)
        group = seq.group
        if group.request_id not in self.groups or not group.finished:
            return
        self._release_reserved(group)
        del self.groups[group.request_id]
        if group in self.waiting:
            self.waiting.remove(group)
            self.num_swapped -= group.swapped
        else:
            self.running.remove(group)
        ends = {sibling.status for sibling in group.seqs}
        if SequenceStatus.FINISHED_FAILED in ends:
            self.ledger.failed += 1
        elif SequenceStatus.FINISHED_ABORTED in ends:
            self.ledger.aborted += 1
        else:
            self.ledger.finished += 1
