"""A scheduler and a remembering worker, stepped together."""

from __future__ import annotations

from aserve.core.scheduler import Scheduler, SchedulerLimits
from aserve.core.sequence import SequenceGroup
from aserve.messages.params import SamplingParams
from tests.core.memory_worker import MemoryWorker


class Driver:
    """Checks every invariant after every step; time passes by the second."""

    def __init__(self, *, overlap: int = 0, max_steps: int = 1, **limits) -> None:
        defaults = {
            "num_blocks": 64,
            "block_size": 4,
            "max_num_batched_tokens": 64,
            "max_num_seqs": 8,
        }
        self.limits = SchedulerLimits(**{**defaults, **limits})
        self.scheduler = Scheduler(self.limits)
        self.worker = MemoryWorker(
            self.limits.num_blocks,
            self.limits.block_size,
            self.limits.max_num_seqs,
            self.limits.num_swap_blocks,
            self.limits.window,
            self.limits.num_lookahead_slots,
        )
        self.overlap = overlap
        self.max_steps = max_steps
        self.issued = []
        self.plans = []
        self.now = 0.0

    def add(self, name, prompt, *, arrival=None, max_model_len=200, group_options=None, **params):
        """prompt: token ids, or how many of them."""
        self.now += 1.0
        options = {"max_tokens": 10, "temperature": 1.0, **params}
        ids = prompt if isinstance(prompt, list) else [len(name) + i % 60 for i in range(prompt)]
        group = SequenceGroup(
            name,
            None,
            ids,
            SamplingParams(**options),
            self.now if arrival is None else arrival,
            max_model_len,
            rng_base=len(name),
            **(group_options or {}),
        )
        self.accepted = self.scheduler.add(group)
        return group

    def step(self, duration=1.0):
        """Schedules, and commits what is due; returns the plan's rows as [(request, count)]."""
        plan = self.scheduler.schedule(self.now, self.max_steps)
        rows = None
        if plan is not None:
            self.plans.append(plan)
            rows = [
                (seq.group.request_id, count)
                for seq, count in zip(plan.ticket.rows, plan.counts, strict=True)
            ]
            self.issued.append((plan, self.worker.run(plan)))
        self.now += duration
        while len(self.issued) > self.overlap or (plan is None and self.issued):
            self.scheduler.commit(*self.issued.pop(0), self.now)
        self.scheduler.verify()
        return rows

    def run(self, steps=2000):
        for _ in range(steps):
            self.step()
            if not self.scheduler.groups and not self.issued:
                return
        raise AssertionError("it never ended")

    @property
    def used(self) -> int:
        return self.limits.num_blocks - self.scheduler.blocks.num_free
