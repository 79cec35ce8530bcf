"""Virtual time: equal to what a hand works out, conserving requests, monotone, the same every time."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from aserve.simulate import policy, virtual
from aserve.simulate.compare import Scenario, simulate
from aserve.simulate.device import PRESETS, Device, ModelShape, Profile
from aserve.simulate.report import summary
from aserve.simulate.trace import Lengths, Request, TraceSpec

TINY = ModelShape(1, 8, 1, 1, 8, 8, 8, max_model_len=64)
# So fast that only the fixed second of a step is left.
SECOND = Profile("second", TINY, Device(bandwidth=1e30, flops=1e30, memory=1e6, step_seconds=1.0))


def run(requests: list[Request], profile: Profile = SECOND, concurrency: int | None = None, **chosen):
    chosen = {"block_size": 4, "num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64} | chosen
    limits, serving = policy.resolve(chosen, profile)
    return virtual.Simulation(requests, profile, limits, serving, concurrency).execute()


def requests(*each: tuple[float, int, int]) -> list[Request]:
    return [Request(index, *values) for index, values in enumerate(each)]


def times(found: virtual.Run) -> list[tuple[float, ...]]:
    """(queued for, first token, last token) per request, on the clock."""
    return [
        (outcome.scheduled - outcome.sent, outcome.first, outcome.last)
        for outcome in found.outcomes
        if outcome.scheduled is not None
    ]


@pytest.mark.parametrize("overlap", [0, 1])
def test_one_request_takes_a_step_per_token(overlap: int) -> None:
    found = run(requests((2.0, 5, 3)), overlap=overlap)
    assert times(found) == [pytest.approx((0.0, 3.0, 5.0), abs=1e-9)]
    assert list(found.gaps) == pytest.approx([1.0, 1.0])
    outcome = found.outcomes[0]
    assert (outcome.ttft, outcome.tpot, outcome.latency) == pytest.approx((1.0, 1.0, 3.0))
    assert (found.steps, found.computed, found.busy) == (3, 7, pytest.approx(3.0))
    assert found.seconds == pytest.approx(5.0)


def test_an_arrival_waits_for_the_step_and_for_the_one_already_issued() -> None:
    alone = run(requests((0.0, 5, 4), (0.5, 5, 1)), overlap=0)
    assert times(alone)[1] == pytest.approx((0.5, 2.0, 2.0))
    ahead = run(requests((0.0, 5, 4), (0.5, 5, 1)), overlap=1)
    assert times(ahead)[1] == pytest.approx((0.5, 3.0, 3.0))


def test_overlap_hides_the_host() -> None:
    busy = dataclasses.replace(SECOND, device=dataclasses.replace(SECOND.device, host_seconds=0.5))
    assert run(requests((0.0, 4, 5)), busy, overlap=0).seconds == pytest.approx(5 * 1.5)
    assert run(requests((0.0, 4, 5)), busy, overlap=1).seconds == pytest.approx(5 * 1.0 + 0.5)


def test_each_delivered_token_costs_the_host() -> None:
    busy = dataclasses.replace(SECOND, device=dataclasses.replace(SECOND.device, host_token_seconds=0.125))
    assert times(run(requests((0.0, 4, 1), (0.0, 4, 1)), busy)) == [(0.0, 1.25, 1.25)] * 2


def test_a_chunked_prompt_takes_its_chunks() -> None:
    found = run(requests((0.0, 20, 2)), max_num_batched_tokens=8, overlap=0)
    assert times(found) == [pytest.approx((0.0, 3.0, 4.0))]
    assert found.computed == 21


def test_a_closed_loop_sends_the_next_when_one_ends() -> None:
    found = run(requests(*[(0.0, 4, 3)] * 4), concurrency=2, overlap=0)
    assert [outcome.sent for outcome in found.outcomes] == pytest.approx([0, 0, 3, 3])
    assert [outcome.ttft for outcome in found.outcomes] == pytest.approx([1, 1, 1, 1])


def test_one_turn_at_a_time_counts_from_the_arrival_when_it_is_free() -> None:
    found = run(requests((0.0, 4, 2), (5.0, 4, 2)), concurrency=1)
    assert found.outcomes[1].sent == 5.0


def test_a_full_queue_rejects_and_the_rest_is_served() -> None:
    found = run(requests(*[(0.0, 4, 3)] * 6), max_num_seqs=2, max_waiting_requests=3)
    assert Counter(outcome.cause for outcome in found.outcomes) == {"finished": 3, "rejected": 3}
    found = run(requests(*[(0.0, 4, 3)] * 6), max_num_seqs=2, max_waiting_tokens=17)
    assert Counter(outcome.cause for outcome in found.outcomes) == {"finished": 4, "rejected": 2}


def test_a_lower_priority_number_goes_first() -> None:
    batch = [Request(0, 0.0, 4, 4), *(Request(index, 0.5, 4, 2, priority=5 - index) for index in (1, 2, 3))]
    found = run(batch, max_num_seqs=1, overlap=0)
    order = sorted(found.outcomes[1:], key=lambda outcome: outcome.first)
    assert [outcome.request.index for outcome in order] == [3, 2, 1]


def test_a_deadline_ends_what_is_not_done() -> None:
    found = run(requests((0.0, 4, 10), (0.0, 4, 3)), timeout=4.5)
    assert [outcome.cause for outcome in found.outcomes] == ["timed out", "finished"]
    assert found.outcomes[0].tokens == 5  # seen when the fifth step's tokens are handled
    assert found.outcomes[0].latency == pytest.approx(5.0)


def test_what_can_never_fit_is_counted() -> None:
    found = run(requests((0.0, 65, 2), (0.0, 8, 2)))
    assert [outcome.cause for outcome in found.outcomes] == ["too long", "finished"]
    found = run(requests((0.0, 8, 30)), num_blocks=4)
    assert [outcome.cause for outcome in found.outcomes] == ["capped"]
    assert found.outcomes[0].tokens == 8


def test_too_few_blocks_preempt_and_lose_no_token() -> None:
    found = run(requests(*[(0.0, 8, 12)] * 4), num_blocks=12)
    assert found.preemptions > 0
    assert [outcome.tokens for outcome in found.outcomes] == [12] * 4
    assert sum(outcome.preemptions for outcome in found.outcomes) == found.preemptions
    assert summary(found, {})["recomputed_tokens"] > 0
    assert summary(run(requests(*[(0.0, 8, 12)] * 4)), {})["recomputed_tokens"] == 0


def test_the_timeline_adds_up_however_often_it_is_halved() -> None:
    found = run(requests(*[(float(at), 4, 3) for at in range(0, 60, 2)]))
    buckets = found.timeline.buckets
    assert len(buckets) <= 1024
    assert sum(bucket.steps for bucket in buckets) == found.steps
    assert sum(bucket.tokens for bucket in buckets) == found.computed
    assert sum(bucket.busy for bucket in buckets) == pytest.approx(found.busy)
    assert [bucket.start for bucket in buckets] == pytest.approx(
        [index * found.timeline.width for index in range(len(buckets))]
    )


def test_known_outputs_reach_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {}
    end = virtual.Simulation._end

    def note(self, group, cause, now) -> None:
        seen[group.request_id] = group.seqs[0].output_token_ids
        end(self, group, cause, now)

    monkeypatch.setattr(virtual.Simulation, "_end", note)
    known = [
        Request(0, 0.0, 3, 4, prompt=(1, 2, 3), output=(9, 8, 7, 6)),
        Request(1, 0.0, 2, 2),
        Request(2, 1.0, 2, 3, prompt=(5, 5), output=(4, 3, 2)),
    ]
    run(known)
    assert seen == {"0": [9, 8, 7, 6], "1": [0, 0], "2": [4, 3, 2]}


# ---------------------------------------------------------------- whole traces


def scenario(rate: float = 8.0, count: int = 150, **more) -> Scenario:
    options = {
        "inputs": Lengths.parse("lognormal:300:0.9:3000", "input_len"),
        "outputs": Lengths.parse("uniform:1:120", "output_len"),
        "count": count,
        "rate": rate,
        "seed": 3,
    }
    chosen = more.pop("chosen", {})
    goodput = {"ttft": 500.0, "tpot": 30.0}
    return Scenario(PRESETS["h100-8b"], TraceSpec(**(options | more)), chosen=chosen, goodput=goodput)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("pressed", [True, False])
def test_every_request_ends_in_one_way(chunked: bool, pressed: bool) -> None:
    chosen = {"chunked_prefill": chunked}
    if pressed:
        chosen |= {"num_blocks": 260, "max_waiting_requests": 40, "timeout": 3.0, "max_num_seqs": 24}
    found = simulate(scenario(rate=60.0, chosen=chosen))
    causes = Counter(outcome.cause for outcome in found.outcomes)
    assert sum(causes.values()) == len(found.outcomes) == 150
    assert causes.keys() <= {"finished", "rejected", "timed out", "too long", "capped"}
    assert all(
        outcome.tokens == outcome.request.output_tokens
        for outcome in found.outcomes
        if outcome.cause == "finished"
    )
    assert len(found.gaps) == sum(max(0, outcome.tokens - 1) for outcome in found.outcomes)
    assert found.busy <= found.seconds
    if pressed:
        assert causes["rejected"] and causes["timed out"] and found.preemptions
    else:
        assert causes == {"finished": 150}


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    first, second = simulate(scenario()), simulate(scenario())
    assert [dataclasses.astuple(outcome) for outcome in first.outcomes] == [
        dataclasses.astuple(outcome) for outcome in second.outcomes
    ]
    assert (first.gaps, first.timeline.buckets) == (second.gaps, second.timeline.buckets)
    assert simulate(scenario(seed=4)).seconds != first.seconds


@pytest.mark.parametrize("chunked", [True, False])
def test_more_load_is_no_faster(chunked: bool) -> None:
    results = [
        summary(simulate(scenario(rate, chosen={"chunked_prefill": chunked})), scenario().goodput)
        for rate in (2.0, 10.0, 50.0)
    ]
    for name in ("mean_ttft_ms", "mean_e2el_ms", "p50_itl_ms", "mean_queue_ms", "device_utilisation"):
        values = [result[name] for result in results]
        assert values == sorted(values), name
    assert results[0]["attainment"] >= results[1]["attainment"] >= results[2]["attainment"]


def test_a_device_twice_as_fast_halves_the_gaps() -> None:
    slow = scenario()
    device = dataclasses.replace(slow.profile.device, bandwidth=6.7e12, flops=1978e12, step_seconds=0.15e-3)
    fast = dataclasses.replace(slow, profile=dataclasses.replace(slow.profile, device=device))
    before, after = (summary(simulate(each), {})["p50_itl_ms"] for each in (slow, fast))
    assert 0.4 * before < after < 0.6 * before


def test_chunked_prefill_keeps_streams_flowing_while_long_prompts_arrive() -> None:
    streams = [Request(index, 0.0, 64, 400) for index in range(16)]
    long = [Request(16 + index, 0.5 + 0.3 * index, 7000, 4) for index in range(6)]
    found = {}
    for chunked in (True, False):
        chosen = {"chunked_prefill": chunked}
        limits, serving = policy.resolve(chosen, PRESETS["h100-8b"])
        done = virtual.Simulation([*streams, *long], PRESETS["h100-8b"], limits, serving).execute()
        found[chunked] = summary(done, {})
    assert found[True]["p99_itl_ms"] < 0.2 * found[False]["p99_itl_ms"]
    assert found[True]["p50_itl_ms"] < 2 * found[False]["p50_itl_ms"]


def test_a_shared_prefix_is_computed_once() -> None:
    shared = {"prefix_tokens": 1600, "inputs": Lengths.parse("64", "input_len"), "count": 40}
    results = {}
    for caching in (True, False):
        chosen = {"prefix_caching": caching}
        results[caching] = summary(simulate(scenario(4.0, chosen=chosen, **shared)), {})
    assert results[False]["cached_tokens"] == 0
    assert results[True]["cached_tokens"] >= 38 * 1600
    assert results[True]["mean_ttft_ms"] < 0.6 * results[False]["mean_ttft_ms"]


def test_swapping_computes_nothing_again() -> None:
    chosen = {"num_blocks": 12, "num_swap_blocks": 64, "preemption_mode": "swap"}
    found = run(requests(*[(0.0, 8, 12)] * 4), **chosen)
    assert found.preemptions > 0
    assert summary(found, {})["recomputed_tokens"] == 0
