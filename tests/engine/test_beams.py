"""Beam search through the engine: text, stop strings, log-probabilities, and what goes wrong."""

from __future__ import annotations

import asyncio

import pytest

from aserve.engine import output as output_module
from aserve.errors import RequestFailedError
from aserve.messages.params import SamplingParams
from aserve.tokenizer.detokenizer import Detokenizer
from tests.core.memory_worker import expected_beams, likeliest, prefix_hash

BEAM = {"use_beam_search": True, "temperature": 0.0}
EOS = 2


def ask(engine, prompt=(10, 11, 12), **params):
    options = {"n": 4, "best_of": 4, "max_tokens": 14, **BEAM, **params}
    engine.add_request("a", None, SamplingParams(**options), prompt_token_ids=list(prompt))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
        engine.core.verify()
    assert engine.core.blocks.num_free == engine.core.blocks.num_blocks
    (output,) = outputs  # beams are told at the end
    assert output.finished
    return output


def decoded(engine, tokens):
    detokenizer = Detokenizer(engine.get_tokenizer(), [10, 11, 12])
    return "".join(detokenizer.append(tokens)) + detokenizer.flush()


def test_the_best_come_first_and_whole(make_engine):
    engine = make_engine()
    output = ask(engine, n=3, best_of=4, length_penalty=2.0)
    expected = expected_beams([10, 11, 12], 4, 14, {EOS}, 2.0)[:3]
    assert [(each.token_ids, each.cumulative_logprob) for each in output.outputs] == expected
    assert [each.index for each in output.outputs] == [0, 1, 2]
    for each in output.outputs:
        stopped = each.token_ids[-1] == EOS
        assert each.text == decoded(engine, each.token_ids)
        assert each.finish_reason == ("stop" if stopped else "length") and each.stop_reason is None
    assert output.metrics.first_token_time <= output.metrics.finished_time


@pytest.mark.parametrize("include", [False, True])
def test_stop_tokens_and_their_text(make_engine, include):
    engine = make_engine()
    stops = [20, 30, 40, 41]
    output = ask(engine, stop_token_ids=stops, include_stop_str_in_output=include)
    expected = expected_beams([10, 11, 12], 4, 14, {EOS, *stops})
    assert [(each.token_ids, each.cumulative_logprob) for each in output.outputs] == expected
    reasons = {each.stop_reason for each in output.outputs}
    assert reasons & set(stops)
    for each in output.outputs:
        told = each.token_ids if include or each.stop_reason is None else each.token_ids[:-1]
        assert each.text == decoded(engine, told)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("min_tokens", [0, 6])
def test_stop_strings_end_beams(make_engine, include, min_tokens):
    engine = make_engine()
    free = ask(engine, ignore_eos=True)
    # Two characters of the best output and two of another, in the middle of both, and one that is frequent.
    words = [free.outputs[0].text[4:6], free.outputs[3].text[2:4], free.outputs[1].text[8:9]]
    output = ask(
        engine,
        ignore_eos=True,
        stop=words,
        include_stop_str_in_output=include,
        min_tokens=min_tokens,
        length_penalty=0.0,
    )

    def stops(tokens):
        text, before = decoded(engine, tokens), decoded(engine, tokens[:-1])
        new = [word for word in words if text.find(word, max(0, len(before) - len(word) + 1)) >= 0]
        return bool(new) and len(tokens) >= min_tokens

    expected = expected_beams([10, 11, 12], 4, 14, stops, 0.0)
    assert [(each.token_ids, each.cumulative_logprob) for each in output.outputs] == expected
    ended = [each for each in output.outputs if each.finish_reason == "stop"]
    assert ended and all(each.stop_reason in words for each in ended)
    for each in ended:
        text = decoded(engine, each.token_ids)
        at = text.rindex(each.stop_reason)
        assert each.text == text[: at + len(each.stop_reason) if include else at]
        assert min_tokens <= len(each.token_ids)


@pytest.mark.parametrize("count", [0, 2, 20])
def test_logprobs_of_every_token(make_engine, count):
    engine = make_engine(max_logprobs=20)
    output = ask(engine, prompt=(10, 11, 12), logprobs=count, ignore_eos=True)
    for each in output.outputs:
        prefix = 0
        for token in (10, 11, 12):
            prefix = prefix_hash(prefix, token)
        assert len(each.logprobs) == len(each.token_ids) == 14
        total = 0.0
        for token, entry in zip(each.token_ids, each.logprobs, strict=True):
            ids, values = likeliest(prefix)
            assert set(entry) == {token, *ids[:count]}
            assert entry[token].rank == ids.index(token) + 1
            for other, shown in entry.items():
                assert shown.logprob == values[ids.index(other)]
            total += entry[token].logprob
            prefix = prefix_hash(prefix, token)
        assert each.cumulative_logprob == pytest.approx(total)
        pairs = zip(each.token_ids, each.logprobs, strict=True)
        assert "".join(entry[token].decoded_token for token, entry in pairs) == each.text


def test_without_detokenising(make_engine):
    output = ask(make_engine(), detokenize=False)
    assert [each.text for each in output.outputs] == [""] * 4
    assert [each.token_ids for each in output.outputs] == [
        tokens for tokens, _ in expected_beams([10, 11, 12], 4, 14, {EOS})
    ]


def test_prompt_logprobs(make_engine):
    output = ask(make_engine(), prompt_logprobs=0)
    assert len(output.prompt_logprobs) == 3 and output.prompt_logprobs[0] is None


def test_a_cache_too_small_ends_the_search(make_engine):
    engine = make_engine(num_blocks=16, max_num_seqs=4)
    output = ask(engine, prompt=range(3, 63), max_tokens=None, ignore_eos=True)
    assert [each.finish_reason for each in output.outputs] == ["length"] * 4
    assert all(each.text == decoded(engine, each.token_ids) for each in output.outputs)
    assert engine.core.ledger.finished == 1


class Broken:
    """Fails at the sixth token."""

    def __init__(self, *_args, **_options):
        self.left = 6

    def push(self, _token_id):
        self.left -= 1
        if not self.left:
            raise ValueError("no text")
        return "t"

    def fork(self):
        copy = Broken()
        copy.left = self.left
        return copy

    def flush(self):
        return ""


@pytest.mark.parametrize("stop", [None, "never"])
async def test_a_text_that_cannot_be_made_fails_its_request_alone(make_async, monkeypatch, stop):
    engine = await make_async()
    params = SamplingParams(n=2, best_of=2, max_tokens=12, stop=stop, ignore_eos=True, **BEAM)
    monkeypatch.setattr(output_module, "Detokenizer", Broken)
    stream = engine.generate("hello", params, "broken")
    with pytest.raises(RequestFailedError, match="text"):
        async for _ in stream:
            pass
    monkeypatch.undo()
    results = [output async for output in engine.generate("hello", params, "whole")]
    assert len(results) == 1 and len(results[0].outputs) == 2
    core = engine.engine.core
    assert core.blocks.num_free == core.blocks.num_blocks
    core.verify()


async def test_streams_get_the_whole_at_the_end_and_others_run_beside(make_async):
    engine = await make_async(num_blocks=24, max_num_seqs=6)
    params = SamplingParams(n=2, best_of=4, max_tokens=12, ignore_eos=True, **BEAM)

    async def outputs(params, name):
        return [output async for output in engine.generate("hello", params, name)]

    found = await asyncio.gather(
        outputs(params, "a"),
        outputs(SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0), "b"),
        outputs(params, "c"),
    )
    assert [len(each) for each in found] == [1, 12, 1]
    assert [each.token_ids for each in found[0][0].outputs] == [
        each.token_ids for each in found[2][0].outputs
    ]
    core = engine.engine.core
    assert core.ledger.finished == core.ledger.received == 3
    assert core.blocks.num_free == core.blocks.num_blocks


async def test_an_abandoned_search_frees_everything(make_async):
    engine = await make_async(step_time=0.005)
    params = SamplingParams(n=2, best_of=4, max_tokens=60, ignore_eos=True, **BEAM)
    task = asyncio.ensure_future(anext(aiter(engine.generate("hello", params, "a"))))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await engine.abort("a")
    core = engine.engine.core
    assert not core.groups and core.blocks.num_free == core.blocks.num_blocks
    assert core.ledger.aborted == 1
