"""Deadlines, full queues, priorities, swapping and the prefix cache as callers of the engine see them."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from aserve.errors import InvalidRequestError, QueueFullError, RequestTimeoutError
from aserve.messages.inputs import OutputKind, RequestOptions
from aserve.messages.params import SamplingParams


def params(**options) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True, "seed": 1, **options})


def series(engine, name: str) -> float:
    lines = engine.stats.render().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def drain(engine):
    outputs = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id] = output
    return outputs


# ------------------------------------------------------------------ the prefix cache


@pytest.mark.parametrize("overlap", [0, 1])
async def test_a_second_turn_is_told_what_was_cached(make_async, overlap):
    engine = await make_async(enable_prefix_caching=True, overlap=overlap)
    prompt = "a system prompt that all of them share: "
    outputs = []
    for question in ("one", "two"):
        stream = await engine.submit(prompt + question, params(), kind=OutputKind.FINAL_ONLY)
        outputs.append(await stream.final())
    assert [output.num_cached_tokens for output in outputs] == [0, 40]
    text = "".join([prompt, "one", outputs[0].outputs[0].text])
    ids = [*outputs[0].prompt_token_ids, *outputs[0].outputs[0].token_ids, 7]
    stream = await engine.submit(
        {"prompt_token_ids": ids, "prompt": text}, params(), kind=OutputKind.FINAL_ONLY
    )
    assert (await stream.final()).num_cached_tokens == (len(ids) - 2) // 8 * 8
    assert series(engine, "vllm:prefix_cache_hits_total") == 40 + (len(ids) - 2) // 8 * 8
    assert series(engine, "vllm:prefix_cache_queries_total") == 43 + 43 + len(ids)
    # Found tokens were taken care of, too: dashboards divide this by the number of requests.
    assert series(engine, "vllm:prompt_tokens_total") == 43 + 43 + len(ids)


async def test_a_salt_keeps_strangers_out(make_async):
    engine = await make_async(enable_prefix_caching=True)
    cached = []
    for salt in (None, "mine", "mine", "yours"):
        stream = await engine.submit("x" * 50, params(), options=RequestOptions(cache_salt=salt))
        cached.append((await stream.final()).num_cached_tokens)
    assert cached == [0, 0, 48, 0]


def test_without_caching_the_count_is_nought(make_engine):
    engine = make_engine()
    engine.add_request("a", "hello", params())
    assert drain(engine)["a"].num_cached_tokens == 0


# ------------------------------------------------------------------ deadlines


async def test_a_request_past_its_timeout_raises_at_its_caller(make_async):
    engine = await make_async(step_time=0.01)
    slow = await engine.submit("slow", params(max_tokens=100), options=RequestOptions(timeout=0.15))
    other = await engine.submit("other", params(max_tokens=40), options=RequestOptions(timeout=60))
    started = time.monotonic()
    with pytest.raises(RequestTimeoutError) as caught:
        async for _ in slow:
            pass
    assert caught.value.status == 408 and time.monotonic() - started < 2
    assert (await other.final()).finished
    assert series(engine, "aserve:requests_aborted_total") == 1
    assert b'cause="timeout"' in engine.stats.render()
    assert engine.engine.core.blocks.num_free == engine.engine.core.blocks.num_blocks
    engine.engine.core.verify()


def test_stepping_by_hand_a_timeout_ends_with_abort(make_engine):
    engine = make_engine()
    engine.add_request(
        "a", "hello", params(max_tokens=100), arrival_time=time.time() - 10, options=RequestOptions(timeout=5)
    )
    (output,) = engine.step()
    assert output.finished and output.outputs[0].finish_reason == "abort"
    assert engine.core.ledger.aborted == 1 and not engine.output.states


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("timeout", {"timeout": 0}),
        ("timeout", {"timeout": float("inf")}),
        ("timeout", {"timeout": True}),
        ("timeout", {"timeout": "5"}),
        ("priority", {"priority": 1.5}),
        ("priority", {"priority": 1 << 40}),
        ("cache_salt", {"cache_salt": ""}),
        ("cache_salt", {"cache_salt": 5}),
    ],
)
def test_options_that_make_no_sense(param, options):
    with pytest.raises(InvalidRequestError) as caught:
        RequestOptions(**options)
    assert caught.value.param == param


# ------------------------------------------------------------------ queues


async def test_a_burst_on_a_bounded_queue(make_async):
    engine = await make_async(max_waiting_requests=20, max_num_seqs=4, step_time=0.001)
    results = await asyncio.gather(
        *(engine.submit(f"prompt {i}", params(max_tokens=3)) for i in range(500)), return_exceptions=True
    )
    streams = [result for result in results if not isinstance(result, BaseException)]
    refused = [result for result in results if isinstance(result, BaseException)]
    assert len(streams) == 20 and all(isinstance(error, QueueFullError) for error in refused)
    assert all(error.status == 429 and 1 <= error.retry_after <= 60 for error in refused)
    for stream in streams:
        assert (await stream.final()).finished
    ledger = engine.engine.core.ledger
    assert (ledger.received, ledger.finished, ledger.rejected) == (500, 20, 480)
    assert series(engine, "aserve:requests_rejected_total") == 480
    assert (await (await engine.submit("again", params())).final()).finished


async def test_refusal_comes_before_tokenising(make_async, monkeypatch):
    engine = await make_async(max_waiting_requests=1, max_num_seqs=1, step_time=0.05)
    first = await engine.submit("first", params(max_tokens=30))
    await anext(first)
    second = await engine.submit("second", params(max_tokens=2))

    def encode(*_):
        raise AssertionError("a refused prompt was tokenised")

    monkeypatch.setattr(engine.engine.input, "encode", encode)
    with pytest.raises(QueueFullError, match="1 requests are waiting"):
        await engine.submit("third", params())
    monkeypatch.undo()
    for stream in (first, second):
        assert (await stream.final()).finished


async def test_long_prompts_being_tokenised_count_as_waiting(make_async):
    engine = await make_async(max_waiting_requests=2, max_num_seqs=1, max_model_len=128)
    long = "y" * 5000
    results = await asyncio.gather(*(engine.submit(long, params()) for _ in range(6)), return_exceptions=True)
    assert sum(isinstance(result, QueueFullError) for result in results) == 4


def test_lower_priority_numbers_run_first(make_engine):
    engine = make_engine(max_num_seqs=1)
    for name, priority in (("late", 5), ("first", -1), ("middle", 0)):
        engine.add_request(name, "hello", params(max_tokens=1), options=RequestOptions(priority=priority))
    seen = []
    while engine.has_unfinished_requests():
        seen += [output.request_id for output in engine.step()]
    assert seen == ["first", "middle", "late"]


# ------------------------------------------------------------------ swapping


def test_swapped_requests_show_and_their_outputs_do_not(make_engine):
    def run(**options):
        engine = make_engine(**options)
        for index in range(6):
            engine.add_request(str(index), "x" * (10 + index), params(max_tokens=60, n=2, temperature=1))
        seen = 0.0
        outputs = {}
        while engine.has_unfinished_requests():
            outputs.update({output.request_id: output for output in engine.step()})
            seen = max(seen, series(engine, "vllm:num_requests_swapped"))
            assert (series(engine, "vllm:cpu_cache_usage_perc") > 0) == (engine.core.num_swapped > 0)
        tokens = [[o.token_ids for o in outputs[str(i)].outputs] for i in range(6)]
        return tokens, seen, engine.core.num_preemptions

    expected, none, _ = run(num_blocks=256)
    got, most, preemptions = run(num_blocks=40, num_swap_blocks=200)
    assert got == expected
    assert none == 0 < most and preemptions > 0


# ------------------------------------------------------------------ several steps at once


@pytest.mark.parametrize("overlap", [0, 1])
async def test_several_steps_give_the_same_outputs(make_async, overlap):
    found = []
    for steps in (1, 8):
        engine = await make_async(max_steps=steps, overlap=overlap)
        streams = [await engine.submit("hello" * n, params(temperature=0, max_tokens=30)) for n in (1, 2, 3)]
        deltas = [[output.outputs[0] async for output in stream] for stream in streams]
        found.append([[token for delta in each for token in delta.token_ids] for each in deltas])
        assert [len(tokens) for tokens in found[-1]] == [30, 30, 30]
        assert (engine.engine.executor.plans < 30) == (steps > 1)
        assert series(engine, "vllm:generation_tokens_total") == 90
        assert series(engine, "vllm:time_per_output_token_seconds_count") == 87
    assert found[0] == found[1]


@pytest.mark.parametrize("place", [1, 5, 8, 13])
async def test_a_stop_token_among_several_steps_takes_no_text_with_it(make_async, place):
    """The text before it, the same as step by step, whole and streamed."""
    alone = await make_async(max_steps=1)
    options = {"temperature": 0, "max_tokens": 30}
    free = (await (await alone.submit("hello", params(**options))).final()).outputs[0]
    stop = free.token_ids[place]
    options["stop_token_ids"] = [stop]
    found = []
    for engine in (alone, await make_async(max_steps=8)):
        final = (
            await (await engine.submit("hello", params(**options), kind=OutputKind.FINAL_ONLY)).final()
        ).outputs[0]
        stream = await engine.submit("hello", params(**options))
        deltas = [output.outputs[0] async for output in stream]
        assert "".join(delta.text for delta in deltas) == final.text
        assert final.finish_reason == "stop"
        found.append((final.text, final.token_ids))
    assert found[0] == found[1]
    assert found[0][1] == free.token_ids[: free.token_ids.index(stop) + 1]
    assert free.text.startswith(found[0][0])


async def test_a_new_request_interrupts(make_async):
    engine = await make_async(max_steps=8, step_time=0.02)
    executor = engine.engine.executor
    first = await engine.submit("hello", params(temperature=0, max_tokens=40))
    async with asyncio.timeout(10):
        while engine.engine.core.run_in_flight is None:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)
    running = engine.engine.core.run_in_flight
    assert executor.interrupted == []
    second = await engine.submit("you", params(temperature=0))
    assert executor.interrupted == [running]
    async for _ in second:
        pass
    executor.interrupted.clear()
    async with asyncio.timeout(10):
        while engine.engine.core.run_in_flight is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await engine.abort(first.request_id)
    assert len(executor.interrupted) == 1, "its caller has gone"


def test_steps_are_as_many_as_fit_the_time(make_engine):
    engine = make_engine(max_steps=16)
    assert engine._steps_at_once() == (16, 0.1)
    engine._pace._step_seconds = 0.02
    assert engine._steps_at_once() == (5, 0.1)
    engine.add_request("a", "hello", params())  # whoever steps an engine sees each output
    for seconds, steps in ((0.0005, 16), (0.004, 4), (0.009, 1), (0.5, 1)):
        engine._pace._step_seconds = seconds
        assert engine._steps_at_once() == (steps, 0.016)
    assert make_engine()._steps_at_once() == (1, math.inf)
