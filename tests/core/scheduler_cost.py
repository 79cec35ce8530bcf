"""What a step costs the scheduler: ``python -m tests.core.scheduler_cost [--running N] [--waiting N]``.

Steady state: ``--running`` sequences decode, ``--waiting`` requests queue behind them, now and then one
ends and the next is admitted. Prints the median and the worst hundredth of schedule, commit and both,
in microseconds of this thread's processor time, so that neighbours on the machine do not matter.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time

from aserve.core.scheduler import Scheduler, SchedulerLimits
from aserve.core.sequence import SequenceGroup
from aserve.messages.params import SamplingParams
from aserve.messages.step import StepResult


def measure(
    running: int, waiting: int, steps: int, prefix_caching: bool, chunked: bool
) -> dict[str, list[float]]:
    rng = random.Random(1)
    scheduler = Scheduler(
        SchedulerLimits(
            num_blocks=running * 70,
            block_size=16,
            max_num_batched_tokens=8192,
            max_num_seqs=running,
            prefix_caching=prefix_caching,
            chunked_prefill=chunked,
        )
    )
    system = [rng.randrange(32_000) for _ in range(128)]
    for index in range(running + waiting):
        prompt = system + [rng.randrange(32_000) for _ in range(rng.randrange(20, 200))]
        params = SamplingParams(max_tokens=rng.randrange(100, 600), ignore_eos=True)
        scheduler.add(SequenceGroup(f"r{index}", None, prompt, params, index * 1e-3, 1024, rng_base=index))
    times: dict[str, list[float]] = {"schedule": [], "commit": [], "both": []}
    clock = time.thread_time_ns
    gc.freeze()
    while len(times["both"]) < steps:
        before = clock()
        plan = scheduler.schedule(0.0)
        decided = clock()
        if plan is None:
            raise RuntimeError("nothing left to schedule: raise --waiting")
        count = len(plan.samples)
        result = StepResult(plan.step_id, [rng.randrange(32_000) for _ in range(count)], [-1.0] * count)
        drawn = clock()
        scheduler.commit(plan, result, 0.0)
        after = clock()
        if len(scheduler.running) == running:
            times["schedule"].append((decided - before) / 1e3)
            times["commit"].append((after - drawn) / 1e3)
            times["both"].append((decided - before + after - drawn) / 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    for prefix_caching in (False, True):
        for chunked in (False, True):
            times = measure(options.running, options.waiting, options.steps, prefix_caching, chunked)
            print(f"prefix caching {prefix_caching}, chunked prefill {chunked}:")
            for name, values in times.items():
                worst = statistics.quantiles(values, n=100)[98]
                print(f"  {name:9} median {statistics.median(values):7.0f} us, p99 {worst:7.0f} us")


if __name__ == "__main__":
    main()
