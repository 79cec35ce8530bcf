"""LLMEngine stepped by hand."""

from __future__ import annotations

import pickle

import pytest

from aserve.errors import InvalidRequestError
from aserve.messages.params import SamplingParams


def drain(engine):
    outputs = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id] = output
    return outputs


def test_step_yields_cumulative_outputs(make_engine):
    engine = make_engine()
    assert engine.step() == []
    engine.add_request("a", "hello", SamplingParams(max_tokens=4, ignore_eos=True))
    engine.add_request("b", None, SamplingParams(max_tokens=2, ignore_eos=True), prompt_token_ids=[5, 6])
    assert engine.get_num_unfinished_requests() == 2
    first = engine.step()
    assert {output.request_id: len(output.outputs[0].token_ids) for output in first} == {"a": 1, "b": 1}
    last = drain(engine)
    assert len(last["a"].outputs[0].token_ids) == 4 and last["a"].finished
    assert last["b"].prompt is None and last["b"].prompt_token_ids == [5, 6]
    engine.core.verify()
    assert engine.core.blocks.num_free == engine.core.blocks.num_blocks


def test_both_text_and_ids_use_the_ids(make_engine):
    engine = make_engine()
    engine.add_request(
        "a", {"prompt": "echoed", "prompt_token_ids": [9]}, SamplingParams(max_tokens=1, ignore_eos=True)
    )
    output = drain(engine)["a"]
    assert output.prompt == "echoed" and output.prompt_token_ids == [9]


def test_abort_takes_one_or_many_and_gives_no_output(make_engine):
    engine = make_engine()
    for name in "abc":
        engine.add_request(name, "hello", SamplingParams(max_tokens=50, ignore_eos=True))
    engine.step()
    engine.abort_request("a")
    engine.abort_request(["b", "unknown"])
    assert set(drain(engine)) == {"c"}


def test_prompts_that_never_fit_end_with_length(make_engine):
    engine = make_engine()
    engine.add_request("long", "x" * 1000, SamplingParams())
    (output,) = engine.step()
    assert output.finished and output.outputs[0].finish_reason == "length"
    assert not engine.has_unfinished_requests()


def test_refusals_queue_nothing(make_engine):
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match="max_num_seqs"):
        engine.add_request("a", "x", SamplingParams(use_beam_search=True, best_of=9, temperature=0))
    assert not engine.has_unfinished_requests()


def test_params_are_cloned(make_engine):
    engine = make_engine()
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    engine.add_request("a", "x", params)
    params.max_tokens = 1
    assert len(drain(engine)["a"].outputs[0].token_ids) == 3


def test_an_engine_cannot_be_pickled(make_engine):
    with pytest.raises(RuntimeError, match="pickled"):
        pickle.dumps(make_engine())


def test_a_cache_too_small_for_a_group_ends_it_with_length_not_a_hang(make_engine):
    engine = make_engine(num_blocks=16, max_num_seqs=4)
    engine.add_request("wide", "x" * 60, SamplingParams(n=4, max_tokens=None, ignore_eos=True))
    output = drain(engine)["wide"]
    assert [each.finish_reason for each in output.outputs] == ["length"] * 4
    engine.core.verify()


def test_stop_strings_win_over_length_and_text_is_never_retracted(make_engine):
    engine = make_engine()
    options = {"seed": 11, "ignore_eos": True}
    engine.add_request("plain", "abc", SamplingParams(max_tokens=40, **options))
    text = drain(engine)["plain"].outputs[0].text
    stop = text[17:20]
    at = text.index(stop)
    for include in (False, True):
        engine.add_request(
            "stopped",
            "abc",
            SamplingParams(max_tokens=40, stop=[stop], include_stop_str_in_output=include, **options),
        )
        seen = ""
        while engine.has_unfinished_requests():
            for output in engine.step():
                assert output.outputs[0].text.startswith(seen)
                seen = output.outputs[0].text
        assert seen == text[: at + (len(stop) if include else 0)]
        assert output.outputs[0].finish_reason == "stop" and output.outputs[0].stop_reason == stop
    # The token that completes the stop string is also the last one allowed.
    tokens = len(output.outputs[0].token_ids)
    engine.add_request("both", "abc", SamplingParams(max_tokens=tokens, stop=[stop], **options))
    both = drain(engine)["both"].outputs[0]
    assert both.finish_reason == "stop" and both.text == text[:at]


def test_stop_tokens_are_kept_as_ids_and_left_out_of_the_text(make_engine):
    engine = make_engine()
    options = {"seed": 11, "ignore_eos": True, "max_tokens": 40}
    engine.add_request("plain", "abc", SamplingParams(**options))
    plain = drain(engine)["plain"].outputs[0]
    token = plain.token_ids[9]
    at = plain.token_ids.index(token)
    engine.add_request("stopped", "abc", SamplingParams(stop_token_ids=[token], **options))
    stopped = drain(engine)["stopped"].outputs[0]
    assert stopped.token_ids == plain.token_ids[: at + 1]
    assert stopped.finish_reason == "stop" and stopped.stop_reason == token
    assert plain.text.startswith(stopped.text)
    assert len(stopped.text) <= at
