"""The asynchronous engine over a fake executor: streams, aborts, drain, death."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import threading

import pytest

from aserve.engine.async_engine import AsyncLLMEngine
from aserve.errors import EngineBusyError, EngineDeadError, InvalidRequestError, RequestFailedError
from aserve.messages.inputs import LoRARequest, OutputKind, PoolingParams
from aserve.messages.params import SamplingParams
from aserve.messages.step import StepResult


def params(**options) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True, "seed": 1, **options})


def assert_free(engine: AsyncLLMEngine) -> None:
    core = engine.engine.core
    core.verify()
    assert not core.groups
    assert core.blocks.num_free == core.blocks.num_blocks
    assert not engine.engine.output.states


async def run(engine, prompt="hello", **options):
    stream = await engine.submit(prompt, params(**options), kind=OutputKind.FINAL_ONLY)
    return await stream.final()


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("chunked", [False, True])
async def test_three_kinds_of_output_agree(make_async, overlap, chunked):
    engine = await make_async(overlap=overlap, enable_chunked_prefill=chunked, step_time=0.001)
    final = await run(engine, logprobs=0)
    stream = await engine.submit("hello", params(logprobs=0), kind=OutputKind.DELTA)
    text, ids, logprobs = "", [], []
    async for output in stream:
        (piece,) = output.outputs
        text += piece.text
        ids += piece.token_ids
        logprobs += piece.logprobs or []
    cumulative = [o async for o in engine.generate("hello", params(logprobs=0), "a")]
    whole = final.outputs[0]
    assert (whole.text, whole.token_ids) == (text, ids)
    last = cumulative[-1].outputs[0]
    assert (last.text, last.token_ids, last.finish_reason) == (text, ids, "length")
    for before, after in itertools.pairwise(cumulative):
        assert after.outputs[0].text.startswith(before.outputs[0].text)
        assert len(after.outputs[0].token_ids) > len(before.outputs[0].token_ids)
    assert final.prompt == "hello" and final.finished
    metrics = final.metrics
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time
    assert metrics.first_token_time <= metrics.last_token_time <= metrics.finished_time
    assert_free(engine)


async def test_a_request_leaves_two_lines_in_the_log(make_async, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("aserve"), "propagate", True)
    caplog.set_level(logging.INFO, logger="aserve.requests")
    engine = await make_async()
    stream = await engine.submit("hello", params(max_tokens=3), request_id="a", kind=OutputKind.FINAL_ONLY)
    await stream.final()
    lines = [record.getMessage() for record in caplog.records if record.name == "aserve.requests"]
    assert [line.split(":")[0] for line in lines] == ["accepted a", "ended a"]
    assert "3 generated tokens" in lines[1]


async def test_many_requests_under_a_tiny_cache_give_what_they_give_alone(make_async):
    engine = await make_async(num_blocks=20)
    prompts = ["x" * (i % 40 + 1) for i in range(40)]
    alone = [(await run(engine, prompt, seed=i)).outputs[0].token_ids for i, prompt in enumerate(prompts)]
    together = await asyncio.gather(*(run(engine, prompt, seed=i) for i, prompt in enumerate(prompts)))
    assert [output.outputs[0].token_ids for output in together] == alone
    assert engine.engine.core.num_preemptions > 0
    assert_free(engine)


async def test_a_slow_reader_gets_everything_in_fewer_pieces(make_async):
    engine = await make_async()
    expected = (await run(engine, max_tokens=60)).outputs[0]
    stream = await engine.submit("hello", params(max_tokens=60), kind=OutputKind.DELTA)
    await engine.idle()
    pieces = [output.outputs[0] async for output in stream]
    assert len(pieces) == 1
    assert pieces[0].token_ids == expected.token_ids and pieces[0].text == expected.text
    assert pieces[0].finish_reason == "length"


async def test_best_of_returns_the_likeliest_n_and_is_not_streamed(make_async):
    engine = await make_async()
    stream = await engine.submit("hello", params(n=2, best_of=4), kind=OutputKind.DELTA)
    outputs = [output async for output in stream]
    assert len(outputs) == 1 and len(outputs[0].outputs) == 2
    everything = await run(engine, n=4)
    indices = [output.index for output in everything.outputs]
    assert sorted(indices) == [0, 1, 2, 3]
    assert len({tuple(output.token_ids) for output in everything.outputs}) == 4
    assert_free(engine)


async def test_streams_of_n_carry_every_index(make_async):
    engine = await make_async()
    stream = await engine.submit("hello", params(n=3), kind=OutputKind.DELTA)
    tokens = {0: [], 1: [], 2: []}
    reasons = {}
    async for output in stream:
        for piece in output.outputs:
            tokens[piece.index] += piece.token_ids
            if piece.finish_reason:
                reasons[piece.index] = piece.finish_reason
    assert all(len(ids) == 12 for ids in tokens.values())
    assert reasons == dict.fromkeys(range(3), "length")


# ------------------------------------------------------------------ leaving


async def start_long(engine, count=4):
    streams = [await engine.submit("hi", params(max_tokens=None)) for _ in range(count)]
    for stream in streams:
        await anext(stream)
    return streams


async def test_close_aborts_at_once_and_is_idempotent(make_async):
    engine = await make_async(step_time=0.005)
    streams = await start_long(engine)
    for stream in streams:
        stream.close()
        stream.close()
    assert_free(engine)
    with pytest.raises(StopAsyncIteration):
        await anext(streams[0])
    assert (await run(engine)).finished


async def test_cancelling_the_reader_aborts(make_async):
    engine = await make_async(step_time=0.005)
    (stream,) = await start_long(engine, 1)

    async def read():
        async for _ in stream:
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_free(engine)


async def test_leaving_generate_early_aborts(make_async):
    engine = await make_async(step_time=0.005)
    outputs = engine.generate("hi", params(max_tokens=None), "early")
    async for _ in outputs:
        break
    await outputs.aclose()
    assert_free(engine)


async def test_a_forgotten_stream_is_aborted_by_the_collector(make_async):
    engine = await make_async(step_time=0.005)
    streams = await start_long(engine, 1)
    assert engine.num_unfinished == 1
    del streams
    gc.collect()
    await asyncio.wait_for(engine.idle(), 5)
    assert_free(engine)


async def test_abort_by_id_ends_the_stream_quietly_and_ignores_strangers(make_async):
    engine = await make_async(step_time=0.005)
    stream = await engine.submit("hi", params(max_tokens=None), request_id="mine")
    await anext(stream)
    await engine.abort("somebody else's")
    assert engine.num_unfinished == 1
    await engine.abort("mine")
    assert [output async for output in stream] == []
    assert_free(engine)


async def test_aborting_while_waiting_for_room(make_async):
    engine = await make_async(step_time=0.005, max_num_seqs=1)
    first = await start_long(engine, 1)
    waiting = await engine.submit("later", params())
    assert len(engine.engine.core.waiting) == 1
    waiting.close()
    assert not engine.engine.core.waiting
    first[0].close()
    assert_free(engine)


# ------------------------------------------------------------------ refusing


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"inputs": "", "params": params()}, "prompt"),
        ({"inputs": {"prompt_token_ids": []}, "params": params()}, "prompt"),
        ({"inputs": {"prompt_token_ids": [1, 10**6]}, "params": params()}, "prompt_token_ids"),
        ({"inputs": {"prompt_token_ids": [-1]}, "params": params()}, "prompt_token_ids"),
        ({"inputs": {"prompt_token_ids": [1.5]}, "params": params()}, "prompt_token_ids"),
        ({"inputs": {"prompt_token_ids": [True]}, "params": params()}, "prompt_token_ids"),
        ({"inputs": {}, "params": params()}, "prompt"),
        ({"inputs": 7, "params": params()}, "prompt"),
        ({"inputs": "a", "params": params(logprobs=6)}, "logprobs"),
        ({"inputs": "a", "params": params(prompt_logprobs=6)}, "prompt_logprobs"),
        ({"inputs": "a", "params": params(best_of=9)}, "best_of"),
        ({"inputs": "a", "params": params(logit_bias={10**6: 1.0})}, "logit_bias"),
        ({"inputs": "a", "params": PoolingParams()}, "params"),
        ({"inputs": "a", "params": {"n": 1}}, "params"),
        ({"inputs": "a", "params": params(), "lora_request": LoRARequest("a", 1, "/x")}, "lora_request"),
    ],
)
async def test_bad_input_is_refused_by_field_and_leaves_nothing(make_async, arguments, field):
    engine = await make_async()
    with pytest.raises(InvalidRequestError) as caught:
        await engine.submit(arguments.pop("inputs"), arguments.pop("params"), **arguments)
    assert caught.value.param == field
    assert_free(engine)


async def test_a_live_id_cannot_be_used_twice(make_async):
    engine = await make_async(step_time=0.005)
    stream = await engine.submit("hi", params(max_tokens=None), request_id="same")
    with pytest.raises(KeyError, match="already exists"):
        await engine.submit("hi", params(), request_id="same")
    assert (await anext(stream)).outputs[0].token_ids
    stream.close()
    assert_free(engine)


async def test_a_prompt_beyond_the_model_ends_with_length(make_async):
    engine = await make_async()
    output = await run(engine, "x" * 200)
    assert output.finished and output.outputs[0].finish_reason == "length"
    assert output.outputs[0].text == "" and output.outputs[0].token_ids == []


async def test_max_tokens_none_runs_to_one_beyond_the_models_length(make_async):
    engine = await make_async()
    output = await run(engine, "x" * 100, max_tokens=None)
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 129
    assert output.outputs[0].finish_reason == "length"


async def test_a_long_text_is_tokenised_off_the_loop(make_async):
    engine = await make_async()
    threads = set()
    original = engine.engine.input.encode

    def encode(*args):
        threads.add(threading.current_thread())
        return original(*args)

    engine.engine.input.encode = encode
    await run(engine, "x" * 10_000)
    await run(engine, "x" * 10)
    assert len(threads) == 2 and threading.main_thread() in threads


# ------------------------------------------------------------------ draining and dying


async def test_draining_refuses_new_and_finishes_old(make_async):
    engine = await make_async(step_time=0.002)
    streams = await start_long(engine, 2)
    engine.refuse_new("server is draining")
    assert not engine.ready
    with pytest.raises(EngineBusyError, match="draining"):
        await engine.submit("more", params())
    waiter = asyncio.create_task(engine.idle())
    for stream in streams:
        assert (await stream.final()).finished
    await asyncio.wait_for(waiter, 5)


async def test_abort_all_ends_every_stream_with_the_reason(make_async):
    engine = await make_async(step_time=0.002)
    streams = await start_long(engine, 3)
    engine.abort_all("server is shutting down")
    for stream in streams:
        with pytest.raises(EngineBusyError, match="shutting down"):
            async for _ in stream:
                pass
    await asyncio.wait_for(engine.idle(), 5)
    assert_free(engine)


async def test_a_failed_executor_ends_every_stream_and_is_remembered(make_async):
    def fail(plan):
        if plan.step_id == 3:
            raise RuntimeError("device lost")

    engine = await make_async(before_step=fail)
    streams = [await engine.submit("hi", params()) for _ in range(3)]
    for stream in streams:
        with pytest.raises(EngineDeadError, match="device lost"):
            async for _ in stream:
                pass
    assert engine.errored and not engine.is_running and engine.is_stopped
    with pytest.raises(EngineDeadError, match="device lost"):
        await engine.submit("late", params())
    with pytest.raises(EngineDeadError):
        await engine.check_health()
    await asyncio.wait_for(engine.idle(), 5)


async def test_one_failed_row_ends_one_request(make_async):
    victims = []

    def fail(plan):
        if plan.step_id != 6:
            return None
        victims.append(plan.samples[1][1])
        width = len(plan.samples)
        return StepResult(plan.step_id, [5] * width, [0.0] * width, failed={1: "logits are not finite"})

    engine = await make_async(before_step=fail, overlap=0)
    streams = [await engine.submit(f"hi {i}", params(seed=i)) for i in range(3)]
    results = await asyncio.gather(*(stream.final() for stream in streams), return_exceptions=True)
    failures = [result for result in results if isinstance(result, RequestFailedError)]
    assert len(failures) == 1 and "not finite" in str(failures[0])
    assert sum(1 for result in results if not isinstance(result, Exception)) == 2
    assert_free(engine)


async def test_text_that_cannot_be_made_ends_one_request(make_async, monkeypatch):
    engine = await make_async()
    good = (await run(engine, "good", seed=3)).outputs[0].token_ids
    original = engine.engine.output._advance

    def advance(text, update, last):
        if update.seq.group.prompt == "bad" and update.seq.num_output_tokens == 3:
            raise ValueError("boom")
        original(text, update, last)

    monkeypatch.setattr(engine.engine.output, "_advance", advance)
    bad, fine = await asyncio.gather(run(engine, "bad"), run(engine, "good", seed=3), return_exceptions=True)
    assert isinstance(bad, RequestFailedError)
    assert fine.outputs[0].token_ids == good
    assert_free(engine)


async def test_an_idle_engine_makes_no_steps(make_async):
    engine = await make_async()
    await run(engine)
    before = engine.engine.executor.plans
    await asyncio.sleep(0.05)
    assert engine.engine.executor.plans == before


async def test_starting_rules(checkpoint):
    engine = AsyncLLMEngine(False, False, start_engine_loop=False)
    with pytest.raises(EngineDeadError, match="start"):
        await engine.submit("hi", params())
    with pytest.raises(ValueError, match="engine_use_ray"):
        AsyncLLMEngine(False, True)


async def test_the_loop_starts_once(make_async):
    engine = await make_async()
    with pytest.raises(RuntimeError, match="already running"):
        engine.start_background_loop()
    await engine.stop()
    with pytest.raises(EngineDeadError):
        engine.start_background_loop()


async def test_stopping_ends_open_streams(make_async):
    engine = await make_async(step_time=0.005)
    (stream,) = await start_long(engine, 1)
    await engine.stop()
    with pytest.raises(EngineDeadError, match="stopped"):
        async for _ in stream:
            pass
    await engine.stop()
