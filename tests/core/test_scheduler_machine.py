"""Random requests, aborts, stops and steps; every invariant after each of them."""

from __future__ import annotations

import math
import os
from array import array
from collections import deque

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aserve.core.block_pool import NULL_BLOCK
from aserve.core.scheduler import Scheduler, SchedulerLimits
from aserve.core.sequence import SequenceGroup, SequenceStatus
from aserve.core.waiting import order
from aserve.errors import QueueFullError
from aserve.messages.inputs import PoolingParams
from aserve.messages.params import SamplingParams
from tests.core.memory_worker import (
    VOCAB,
    MemoryWorker,
    expected_beams,
    expected_output,
    expected_vector,
    prefix_hash,
)

MAX_MODEL_LEN = 48
STOP_TOKEN = 7


class SchedulerMachine(RuleBasedStateMachine):
    """Drives a scheduler and a remembering worker with up to one step in flight beyond the oldest."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4, 8]),
        spare_blocks=st.sampled_from([0, 0, 1, 3, 8, 24]),
        max_num_seqs=st.sampled_from([6, 6, 4, 3, 2, 1]),
        chunked=st.booleans(),
        budget=st.integers(1, 40),
        overlap=st.sampled_from([1, 1, 0]),
        delay=st.sampled_from([0.0, 0.5]),
        finding=st.sampled_from(["nothing", "prefixes", "prefixes", "window"]),
        window=st.integers(1, 20),
        swap_blocks=st.sampled_from([60, 60, 6, 0]),
        preemption=st.sampled_from([None, "swap", "recompute"]),
        lookahead=st.sampled_from([0, 0, 1, 5]),
        queue=st.sampled_from([(None, None), (None, None), (3, None), (None, 60)]),
        max_steps=st.sampled_from([1, 2, 5]),
    )
    def start(
        self,
        block_size,
        spare_blocks,
        max_num_seqs,
        chunked,
        budget,
        overlap,
        delay,
        finding,
        window,
        swap_blocks,
        preemption,
        lookahead,
        queue,
        max_steps,
    ):
        num_blocks = -(-MAX_MODEL_LEN // block_size) + spare_blocks
        budget = max(budget, max_num_seqs) if chunked else max(budget, MAX_MODEL_LEN)
        self.limits = SchedulerLimits(
            num_blocks,
            block_size,
            budget,
            max_num_seqs,
            chunked,
            delay,
            prefix_caching=finding == "prefixes",
            window=window if finding == "window" else None,
            num_swap_blocks=swap_blocks,
            preemption_mode=preemption,
            num_lookahead_slots=lookahead,
            max_waiting_requests=queue[0],
            max_waiting_tokens=queue[1],
        )
        self.max_steps = max_steps
        self.scheduler = Scheduler(self.limits)
        self.worker = MemoryWorker(
            num_blocks, block_size, max_num_seqs, swap_blocks, self.limits.window, lookahead
        )
        self.max_num_seqs = max_num_seqs
        self.overlap = overlap
        self.issued = deque()
        self.live: dict[str, SequenceGroup] = {}
        self.capped = set()
        self.texts = [[1]]
        self.names = 0
        self.received = self.rejected = self.ended = 0
        self.now = 0.0

    @rule(
        data=st.data(),
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=MAX_MODEL_LEN + 4),
        max_tokens=st.sampled_from([None, None, 1, 5, 20, 40]),
        width=st.sampled_from([1, 1, 1, 2, 3, 4]),
        ignore_stop=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        seed=st.integers(0, 2**64 - 1),
        priority=st.sampled_from([0, 0, 0, -1, 5]),
        timeout=st.sampled_from([None] * 8 + [0.0, 1.0]),
        salt=st.sampled_from([None, None, "a"]),
        eos=st.sampled_from([None, None, STOP_TOKEN + 1]),
        beams=st.sampled_from([None, True, False, "never"]),
        length_penalty=st.sampled_from([1.0, 0.0, 2.0, -1.0]),
        pooled=st.sampled_from([False] * 4 + [True]),
    )
    def add(
        self,
        data,
        prompt,
        max_tokens,
        width,
        ignore_stop,
        prompt_logprobs,
        seed,
        priority,
        timeout,
        salt,
        eos,
        beams,
        length_penalty,
        pooled,
    ):
        if data.draw(st.booleans()):  # a prompt that begins like something seen before
            text = data.draw(st.sampled_from(self.texts))
            prompt = (text[: data.draw(st.integers(1, len(text)))] + prompt[:3])[:MAX_MODEL_LEN]
        search = {}
        if beams is not None and width > 1 and not pooled:
            search = {"use_beam_search": True, "early_stopping": beams, "length_penalty": length_penalty}
        params = SamplingParams(
            n=width,
            temperature=0.0 if width == 1 or search else 1.0,
            max_tokens=max_tokens,
            stop_token_ids=[] if ignore_stop else [STOP_TOKEN],
            prompt_logprobs=prompt_logprobs,
            **search,
        )
        if pooled:
            width, params = 1, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        self.names += 1
        self.now += 0.01
        group = SequenceGroup(
            f"r{self.names}",
            None,
            prompt,
            params,
            self.now,
            MAX_MODEL_LEN,
            rng_base=seed,
            priority=priority,
            deadline=None if timeout is None else self.now + timeout,
            cache_salt=salt,
            eos_token_id=eos,
            pooling=PoolingParams() if pooled else None,
        )
        waiting = self.scheduler.waiting
        most = self.limits.max_waiting_requests
        full = most is not None and len(waiting) >= most
        most = self.limits.max_waiting_tokens
        full |= most is not None and len(waiting) > 0 and waiting.num_prompt_tokens + len(prompt) > most
        if width > self.max_num_seqs:
            with pytest.raises(ValueError, match="best_of"):
                self.scheduler.add(group)
            return
        self.received += 1
        if full:
            with pytest.raises(QueueFullError):
                self.scheduler.add(group)
            self.rejected += 1
        elif self.scheduler.add(group):
            self.live[group.request_id] = group
            self.texts.append(prompt)
        else:
            self.rejected += 1
            assert len(prompt) > MAX_MODEL_LEN
            assert group.seqs[0].status is SequenceStatus.FINISHED_IGNORED

    @precondition(lambda self: len(self.issued) <= self.overlap)
    @rule()
    def schedule(self):
        self.now += 0.01
        before = set(map(id, self.scheduler.running))
        plan = self.scheduler.schedule(self.now, self.max_steps, prompt_tokens=self.pace())
        self.collect_ended()
        if plan is None:
            # With nothing in flight there is always something to do, or a request would hang.
            assert self.issued or not self.live
            return
        for group in self.scheduler.running:
            if id(group) not in before:
                assert all(order(group) < order(other) for other in self.scheduler.waiting)
        self.check_plan(plan)
        self.issued.append((plan, self.worker.run(plan)))
        self.check_index()

    @precondition(lambda self: self.issued)
    @rule()
    def commit(self):
        self.now += 0.01
        plan, result = self.issued.popleft()
        changes = self.scheduler.commit(plan, result, self.now)
        assert changes.steps == result.steps
        for group, vector in changes.pooled:
            assert np.array_equal(vector, expected_vector(group.prompt_token_ids))
            assert group.finished and group.seqs[0].num_output_tokens == 0
            assert self.live.pop(group.request_id) is group
            self.ended += 1
        told: dict[int, list[int]] = {}
        for update in changes.tokens:
            assert update.seq.group.pooling is None
            told.setdefault(id(update.seq), []).append(update.token_id)
        for update in changes.tokens:
            new = told[id(update.seq)]
            assert update.seq.token_ids[-len(new) :] == new
            if update.seq.finished:
                self.texts.append(update.seq.token_ids)
                self.check_finished(update.seq.group)
        for group in changes.beams:
            if group.finished:
                self.check_beams(group, self.most_tokens(group))
                self.texts.append(group.seqs[0].token_ids)
                self.check_finished(group)
        self.check_index()

    @precondition(lambda self: self.live)
    @rule(steps=st.integers(2, 12))
    def go_on(self, steps):
        """Time passes: histories of single steps seldom get to where blocks are scarce."""
        for _ in range(steps):
            if len(self.issued) <= self.overlap:
                self.schedule()
            if len(self.issued) > self.overlap:
                self.commit()
            self.everything_adds_up()

    @precondition(lambda self: len(self.live) > 3)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.live)))
        assert self.scheduler.abort(name) is self.live.pop(name)
        assert self.scheduler.abort(name) is None
        self.ended += 1

    @precondition(lambda self: len(self.live) > 3)
    @rule(data=st.data())
    def stop_string(self, data):
        """The detokeniser found a stop string in a sequence that had some output."""
        name = data.draw(st.sampled_from(sorted(self.live)))
        group = self.live[name]
        candidates = [seq for seq in group.unfinished if seq.num_output_tokens > 0]
        if candidates and group.beam is None:
            self.scheduler.finish(candidates[-1], SequenceStatus.FINISHED_STOPPED, "stop")
            if group.finished:
                del self.live[name]
                self.ended += 1

    @invariant()
    def everything_adds_up(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.verify()
        assert set(self.scheduler.groups) == set(self.live)
        assert self.received == self.rejected + self.ended + len(self.live)
        ledger = self.scheduler.ledger
        assert (ledger.received, ledger.rejected) == (self.received, self.rejected)
        assert ledger.finished + ledger.aborted == self.ended

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20_000):
            if not self.live and not self.issued:
                break
            if len(self.issued) <= self.overlap:
                self.schedule()
            if self.issued and (len(self.issued) > self.overlap or not self.live or self.issued):
                self.commit()
            self.scheduler.verify()
        assert not self.live, "requests never ended"
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks
        assert self.scheduler.blocks.swap_pool.num_free == self.limits.num_swap_blocks

    def pace(self):
        """Some number of prompt tokens, another each time."""
        return (math.inf, 3, 7)[len(self.issued) + int(self.now * 100) % 2]

    # ------------------------------------------------------------------ checks

    def check_plan(self, plan):
        limits = self.scheduler.limits
        assert 0 < plan.num_tokens <= limits.max_num_batched_tokens
        assert len(set(plan.slots)) == len(plan.slots) <= limits.max_num_seqs
        prefills = [count > 1 for count in plan.counts]
        assert prefills == sorted(prefills, reverse=True)
        assert sum(prefills) == plan.num_prefill_rows
        named = [slot for _, slot in plan.samples]
        assert len(set(named)) == len(named)
        for seq, count in zip(plan.ticket.rows, plan.counts, strict=True):
            if seq not in plan.ticket.samples and seq not in plan.ticket.beams:
                continue
            room = len(seq.blocks) * limits.block_size - seq.num_computed
            assert room >= min(limits.num_lookahead_slots, seq.max_known - 1 - seq.num_computed)
            if limits.window is not None and count == 1 and not (seq.group.beam and seq.group.beam.parked):
                held = sum(block != NULL_BLOCK for block in seq.blocks)
                ahead = limits.num_lookahead_slots + self.max_steps - 1
                assert held <= -(-(limits.window + ahead) // limits.block_size) + 1

    def check_index(self):
        """Every block that can be found holds the tokens it can be found by."""
        for block, (_, content) in self.scheduler.blocks.pool._published.items():
            cells = self.worker.cells[block]
            tokens = array("I", content)
            assert all(cell is not None for cell in cells)
            for i in range(1, len(cells)):
                assert cells[i] == prefix_hash(cells[i - 1], tokens[i])

    def check_finished(self, group):
        for seq in group.seqs:
            if seq.finished and group.beam is None:
                self.check_output(seq)
        if group.finished and self.live.pop(group.request_id, None):
            self.ended += 1
            if group.params.prompt_logprobs is not None:
                ranks = [entry.rank for entry in group.prompt_logprobs]
                assert ranks == list(range(1, len(group.prompt_token_ids)))

    def most_tokens(self, group):
        params = group.params
        room = MAX_MODEL_LEN + 1 - group.num_prompt_tokens
        return room if params.max_tokens is None else min(room, params.max_tokens)

    def check_beams(self, group, most_tokens):
        params = group.params
        expected = expected_beams(
            group.prompt_token_ids,
            group.width,
            most_tokens,
            {*(params.stop_token_ids or ()), group.eos_token_id},
            params.length_penalty,
            params.early_stopping,
        )
        assert [(seq.output_token_ids, seq.cumulative_logprob) for seq in group.seqs] == expected
        assert all(seq.finished and seq.slot < 0 and not seq.blocks for seq in group.seqs)

    def check_output(self, seq):
        params = seq.group.params
        limit = self.most_tokens(seq.group)
        ends = {*(params.stop_token_ids or ()), seq.group.eos_token_id}
        expected = expected_output(seq.group.prompt_token_ids, seq.rng_seed, limit, ends)
        got = seq.output_token_ids
        assert got == expected[: len(got)]
        if seq.seq_id not in self.capped and seq.stop_reason != "stop":
            assert got == expected

    def collect_ended(self):
        for group in self.scheduler.take_expired():
            assert group.deadline <= self.now
            assert self.live.pop(group.request_id) is group
            self.ended += 1
        for seq in self.scheduler.take_capped():
            if seq.group.beam is not None:
                # All that were running have become hypotheses, as they do at the end of a search that long.
                if seq.group.beam.search.length:
                    self.check_beams(seq.group, seq.group.beam.search.length)
                del self.live[seq.group.request_id]
                self.ended += 1
                continue
            assert seq.status is SequenceStatus.FINISHED_LENGTH
            self.capped.add(seq.seq_id)
            if seq.group.finished and seq.group.request_id in self.live:
                self.check_output(seq)
                del self.live[seq.group.request_id]
                self.ended += 1


SchedulerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("ASERVE_FUZZ_EXAMPLES", "150")),
    stateful_step_count=80,
    deadline=None,
    # Shrinking a long history takes minutes; ask for it where there is one to look at.
    phases=[phase for phase in Phase if phase is not Phase.shrink or os.environ.get("ASERVE_FUZZ_SHRINK")],
    suppress_health_check=list(HealthCheck),
)
TestSchedulerMachine = SchedulerMachine.TestCase
