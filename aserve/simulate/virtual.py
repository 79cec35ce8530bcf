"""The engine's loop in virtual time.

The order of things is that of :func:`aserve.engine.loop.run`: step n + 1 is decided while step n is on the
device, then n is committed. A request that arrives during step n is therefore seen when n - 1's results
have been handled, at the earliest, and computed in step n + 1 or n + 2.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from aserve.core.scheduler import Commit, Scheduler, SchedulerLimits
from aserve.core.sequence import SequenceGroup, SequenceStatus
from aserve.errors import QueueFullError
from aserve.messages.params import SamplingParams
from aserve.messages.step import StepPlan, StepResult
from aserve.simulate.device import Profile
from aserve.simulate.policy import Serving
from aserve.simulate.trace import Request

FINISHED = "finished"
TOO_LONG = "too long"
REJECTED = "rejected"
TIMED_OUT = "timed out"
CAPPED = "capped"

_STOPPED = SequenceStatus.FINISHED_STOPPED
_MOST_BUCKETS = 1024


@dataclass(slots=True)
class Outcome:
    """What became of a request. Seconds of virtual time; None where it never came to that.

    sent: when its client sent it. cause: one of the names above. tokens: generated.
    """

    request: Request
    sent: float
    scheduled: float | None = None
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    preemptions: int = 0
    cause: str = ""

    @property
    def ttft(self) -> float:
        return (self.first or 0.0) - self.sent

    @property
    def latency(self) -> float:
        return (self.last or 0.0) - self.sent

    @property
    def tpot(self) -> float:
        return (self.latency - self.ttft) / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass(slots=True)
class Bucket:
    """A stretch of time. ``kv_usage``, ``running`` and ``waiting`` are the highest seen after a decision."""

    start: float
    steps: int = 0
    tokens: int = 0
    busy: float = 0.0
    kv_usage: float = 0.0
    running: int = 0
    waiting: int = 0


class Timeline:
    """Buckets of equal width that doubles whenever there are too many of them."""

    def __init__(self, width: float = 0.01) -> None:
        self.width = width
        self.buckets: list[Bucket] = []

    def at(self, now: float) -> Bucket:
        while now >= self.width * _MOST_BUCKETS:
            self._halve()
        index = int(now / self.width)
        while len(self.buckets) <= index:
            self.buckets.append(Bucket(len(self.buckets) * self.width))
        return self.buckets[index]

    def _halve(self) -> None:
        self.width *= 2
        merged: list[Bucket] = []
        for index in range(0, len(self.buckets), 2):
            first = self.buckets[index]
            for second in self.buckets[index + 1 : index + 2]:
                first.steps += second.steps
                first.tokens += second.tokens
                first.busy += second.busy
                first.kv_usage = max(first.kv_usage, second.kv_usage)
                first.running = max(first.running, second.running)
                first.waiting = max(first.waiting, second.waiting)
            first.start = len(merged) * self.width
            merged.append(first)
        self.buckets = merged


@dataclass(slots=True)
class Run:
    """A finished simulation.

    gaps: seconds between consecutive tokens of a request, over all requests. operations, bytes: of all
    steps and devices. computed: tokens that steps computed. cached: prompt tokens found in the cache.
    """

    profile: Profile
    limits: SchedulerLimits
    serving: Serving
    outcomes: list[Outcome] = field(default_factory=list)
    gaps: array[float] = field(default_factory=lambda: array("d"))
    seconds: float = 0.0
    busy: float = 0.0
    steps: int = 0
    operations: float = 0.0
    bytes: float = 0.0
    computed: int = 0
    cached: int = 0
    preemptions: int = 0
    timeline: Timeline = field(default_factory=Timeline)


class Simulation:
    """Puts requests, in order of arrival, through a scheduler; at most ``concurrency`` at a time.

    A request that has to wait for its turn is sent, and its times count, when an earlier one ends: with all
    arrivals at 0 that is a closed loop of ``concurrency`` clients.
    """

    def __init__(
        self,
        requests: list[Request],
        profile: Profile,
        limits: SchedulerLimits,
        serving: Serving,
        concurrency: int | None = None,
    ) -> None:
        self.run = Run(profile, limits, serving)
        self.scheduler = Scheduler(limits)
        self._requests = requests
        self._next = 0
        self._concurrency = concurrency or len(requests)
        self._turn_since = 0.0
        self._live: dict[str, Outcome] = {}
        self._params: dict[int, SamplingParams] = {}
        self._outputs = any(request.output for request in requests)
        self._of_slot: dict[int, Request] = {}

    def execute(self) -> Run:
        """Runs until every request has ended. RuntimeError if the scheduler leaves one behind."""
        run, scheduler, device = self.run, self.scheduler, self.run.profile.device
        model = run.profile.step_model(run.limits.block_size, run.limits.window)
        now = free = 0.0
        running: tuple[StepPlan, float] | None = None
        while True:
            self._receive(now)
            plan = scheduler.schedule(now)
            for seq in scheduler.take_capped():
                self._end(seq.group, CAPPED, now)
            for group in scheduler.take_expired():
                self._end(group, TIMED_OUT, now)
            issued = None
            if plan is not None:
                cost = model.of_plan(plan)
                free = max(now, free) + cost.seconds
                issued = (plan, free)
                run.operations += cost.operations
                run.bytes += cost.bytes
                self._note(plan, now, cost.seconds)
            if not run.serving.overlap and issued is not None:
                running, issued = issued, None
            if running is not None:
                done, ends = running
                now = max(now, ends)
                changes = scheduler.commit(done, self._result(done), now)
                now += device.host_seconds + device.host_token_seconds * len(changes.tokens)
                self._deliver(changes, now)
            elif issued is None:
                if self._next == len(self._requests):
                    break
                now = max(now, self._requests[self._next].arrival)
            running = issued
        if scheduler.num_unfinished or self._live:
            raise RuntimeError(f"the scheduler left {scheduler.num_unfinished} requests unfinished")
        scheduler.verify()
        run.seconds = now
        run.preemptions = scheduler.num_preemptions
        return run

    # ---------------------------------------------------------------- requests in

    def _receive(self, now: float) -> None:
        requests = self._requests
        while self._next < len(requests) and len(self._live) < self._concurrency:
            request = requests[self._next]
            if request.arrival > now:
                return
            self._next += 1
            self._send(request, max(request.arrival, self._turn_since))

    def _send(self, request: Request, now: float) -> None:
        outcome = Outcome(request, now)
        self.run.outcomes.append(outcome)
        timeout = self.run.serving.timeout
        group = SequenceGroup(
            str(request.index),
            None,
            request.prompt_ids(),
            self._sampling(request),
            now,
            self.run.profile.model.max_model_len,
            request.index,
            priority=request.priority,
            deadline=None if timeout is None else now + timeout,
        )
        try:
            accepted = self.scheduler.add(group)
        except QueueFullError:
            outcome.cause = REJECTED
            return
        if not accepted:
            outcome.cause = TOO_LONG
            return
        self._live[group.request_id] = outcome

    def _sampling(self, request: Request) -> SamplingParams:
        if self._outputs:
            # The seed tells which request a new sequence of a plan belongs to.
            return SamplingParams(max_tokens=request.output_tokens, ignore_eos=True, seed=request.index)
        params = self._params.get(request.output_tokens)
        if params is None:
            params = SamplingParams(max_tokens=request.output_tokens, ignore_eos=True)
            self._params[request.output_tokens] = params
        return params

    # ---------------------------------------------------------------- a step

    def _note(self, plan: StepPlan, now: float, seconds: float) -> None:
        run, scheduler = self.run, self.scheduler
        tokens = plan.num_tokens
        run.steps += 1
        run.computed += tokens
        run.busy += seconds
        if self._outputs:
            for new in plan.new:
                if new.params.seed is not None:
                    self._of_slot[new.slot] = self._requests[new.params.seed]
        bucket = run.timeline.at(now)
        bucket.steps += 1
        bucket.tokens += tokens
        bucket.busy += seconds
        bucket.kv_usage = max(bucket.kv_usage, scheduler.blocks.pool.usage)
        bucket.running = max(bucket.running, len(scheduler.running))
        bucket.waiting = max(bucket.waiting, len(scheduler.waiting))

    def _result(self, plan: StepPlan) -> StepResult:
        count = len(plan.samples)
        token_ids = [0] * count
        if self._outputs:
            for index, (row, slot) in enumerate(plan.samples):
                request = self._of_slot[slot]
                position = plan.starts[row] + plan.counts[row] - request.input_tokens
                if request.output is not None and position < len(request.output):
                    token_ids[index] = request.output[position]
        return StepResult(plan.step_id, token_ids, [0.0] * count)

    def _deliver(self, changes: Commit, now: float) -> None:
        note_gap = self.run.gaps.append
        for update in changes.tokens:
            seq = update.seq
            group = seq.group
            last = group.last_token_time
            if last is None:
                group.first_token_time = now
            else:
                note_gap(now - last)
            group.last_token_time = now
            if seq.status >= _STOPPED:
                self._end(group, FINISHED, now)
        if changes.failed:
            raise RuntimeError("a simulated device fails nothing, but the scheduler reports a failure")

    def _end(self, group: SequenceGroup, cause: str, now: float) -> None:
        outcome = self._live.pop(group.request_id)
        outcome.cause = cause
        outcome.scheduled = group.first_scheduled_time
        outcome.first, outcome.last = group.first_token_time, group.last_token_time
        outcome.tokens = sum(seq.num_output_tokens for seq in group.seqs)
        outcome.preemptions = group.num_preemptions
        self.run.cached += group.num_cached_tokens or 0
        self._turn_since = now
