"""Random requests, aborts, stops and steps; every invariant after each of them."""

from __future__ import annotations

import os
from collections import deque

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aserve.core.scheduler import Scheduler, SchedulerLimits
from aserve.core.sequence import SequenceGroup, SequenceStatus
from aserve.messages.params import SamplingParams
from tests.core.memory_worker import VOCAB, MemoryWorker, expected_output

MAX_MODEL_LEN = 48
STOP_TOKEN = 7


class SchedulerMachine(RuleBasedStateMachine):
    """Drives a scheduler and a remembering worker with up to one step in flight beyond the oldest."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4, 8]),
        spare_blocks=st.integers(0, 24),
        max_num_seqs=st.integers(1, 6),
        chunked=st.booleans(),
        budget=st.integers(1, 40),
        overlap=st.integers(0, 1),
        delay=st.sampled_from([0.0, 0.5]),
    )
    def start(self, block_size, spare_blocks, max_num_seqs, chunked, budget, overlap, delay):
        num_blocks = -(-MAX_MODEL_LEN // block_size) + spare_blocks
        budget = max(budget, max_num_seqs) if chunked else max(budget, MAX_MODEL_LEN)
        self.scheduler = Scheduler(
            SchedulerLimits(num_blocks, block_size, budget, max_num_seqs, chunked, delay)
        )
        self.worker = MemoryWorker(num_blocks, block_size, max_num_seqs)
        self.max_num_seqs = max_num_seqs
        self.overlap = overlap
        self.issued = deque()
        self.live: dict[str, SequenceGroup] = {}
        self.names = 0
        self.accepted = self.ended = 0
        self.now = 0.0

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=MAX_MODEL_LEN + 4),
        max_tokens=st.one_of(st.none(), st.integers(1, 20)),
        width=st.integers(1, 4),
        ignore_stop=st.booleans(),
        prompt_logprobs=st.booleans(),
        seed=st.integers(0, 2**64 - 1),
    )
    def add(self, prompt, max_tokens, width, ignore_stop, prompt_logprobs, seed):
        params = SamplingParams(
            n=width,
            temperature=1.0,
            max_tokens=max_tokens,
            stop_token_ids=[] if ignore_stop else [STOP_TOKEN],
            prompt_logprobs=0 if prompt_logprobs else None,
        )
        self.names += 1
        self.now += 0.01
        group = SequenceGroup(f"r{self.names}", None, prompt, params, self.now, MAX_MODEL_LEN, rng_base=seed)
        if width > self.max_num_seqs:
            try:
                self.scheduler.add(group)
            except ValueError:
                return
            raise AssertionError("a request wider than max_num_seqs was accepted")
        if self.scheduler.add(group):
            self.live[group.request_id] = group
            self.accepted += 1
        else:
            assert len(prompt) > MAX_MODEL_LEN
            assert group.seqs[0].status is SequenceStatus.FINISHED_IGNORED

    @precondition(lambda self: len(self.issued) <= self.overlap)
    @rule()
    def schedule(self):
        self.now += 0.01
        plan = self.scheduler.schedule(self.now)
        self.collect_capped()
        if plan is None:
            # With nothing in flight there is always something to do, or a request would hang.
            assert self.issued or not self.live
            return
        self.check_plan(plan)
        self.issued.append((plan, self.worker.run(plan)))

    @precondition(lambda self: self.issued)
    @rule()
    def commit(self):
        self.now += 0.01
        plan, result = self.issued.popleft()
        for update in self.scheduler.commit(plan, result, self.now).tokens:
            assert update.seq.token_ids[-1] == update.token_id
            if update.seq.finished:
                self.check_finished(update.seq.group)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.live)))
        assert self.scheduler.abort(name) is self.live.pop(name)
        assert self.scheduler.abort(name) is None
        self.ended += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def stop_string(self, data):
        """The detokeniser found a stop string in a sequence that had some output."""
        name = data.draw(st.sampled_from(sorted(self.live)))
        group = self.live[name]
        candidates = [seq for seq in group.unfinished if seq.num_output_tokens > 0]
        if candidates:
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
        assert self.accepted == self.ended + len(self.live)

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

    def check_finished(self, group):
        for seq in group.seqs:
            if seq.finished:
                self.check_output(seq)
        if group.finished and self.live.pop(group.request_id, None):
            self.ended += 1
            if group.params.prompt_logprobs is not None:
                ranks = [entry.rank for entry in group.prompt_logprobs]
                assert ranks == list(range(1, len(group.prompt_token_ids)))

    def check_output(self, seq):
        params = seq.group.params
        room = MAX_MODEL_LEN + 1 - seq.num_prompt_tokens
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        expected = expected_output(
            seq.group.prompt_token_ids, seq.rng_seed, limit, set(params.stop_token_ids or ())
        )
        got = seq.output_token_ids
        assert got == expected[: len(got)]
        if seq.status is SequenceStatus.FINISHED_STOPPED and seq.stop_reason == STOP_TOKEN:
            assert got == expected

    def collect_capped(self):
        for seq in self.scheduler.take_capped():
            assert seq.status is SequenceStatus.FINISHED_LENGTH
            if seq.group.finished and seq.group.request_id in self.live:
                self.check_output(seq)
                del self.live[seq.group.request_id]
                self.ended += 1


SchedulerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("ASERVE_FUZZ_EXAMPLES", "150")),
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSchedulerMachine = SchedulerMachine.TestCase
