"""LLM on a tiny real model: the synchronous face, and sampling through the whole engine."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from aserve import LLM, SamplingParams
from aserve.errors import ConfigError, InvalidRequestError, RequestFailedError
from tests import tiny_checkpoint

PROMPTS = ["hello", "a", "the quick brown fox", "x" * 30, "streaming tokens", "é€😀"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.write(tmp_path_factory.mktemp("llm"), weights=True)


def make(checkpoint, **options) -> LLM:
    return LLM(str(checkpoint), dtype="float32", **{"max_num_seqs": 8, "block_size": 8, **options})


@pytest.fixture(scope="module")
def llm(checkpoint):
    with make(checkpoint) as built:
        yield built


def tokens(outputs) -> list[list[list[int]]]:
    return [[each.token_ids for each in output.outputs] for output in outputs]


def generate(llm, prompts=PROMPTS, **options) -> Any:
    params = {"max_tokens": 12, "ignore_eos": True, **options}
    return llm.generate(prompts, SamplingParams(**params), use_tqdm=False)


# ------------------------------------------------------------------ calling


def test_all_ways_to_pass_prompts_agree(llm):
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    ids = llm.get_tokenizer().encode("hello")
    ways = [
        llm.generate("hello", params, use_tqdm=False),
        llm.generate(["hello"], params, use_tqdm=False),
        llm.generate({"prompt": "hello"}, params, use_tqdm=False),
        llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False),
        llm.generate(None, params, [ids], use_tqdm=False),
        llm.generate(prompt_token_ids=ids, sampling_params=[params], use_tqdm=False),
        llm.generate(["hello"], [params], [ids], use_tqdm=False),
    ]
    assert len({tuple(way[0].outputs[0].token_ids) for way in ways}) == 1
    assert [way[0].prompt for way in ways] == ["hello"] * 3 + [None] * 3 + ["hello"]


def test_order_is_that_of_the_input_and_ids_count_up(llm):
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in (20, 1, 9)]
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["a", "b", "c"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20, 1, 9]
    ids = [int(output.request_id) for output in outputs]
    assert ids == list(range(ids[0], ids[0] + 3))


def test_defaults_and_the_empty_list(llm):
    assert llm.generate([], use_tqdm=False) == []
    (output,) = llm.generate("hi", use_tqdm=False)
    assert output.finished and len(output.outputs[0].token_ids) <= 16


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "prompts or prompt_token_ids"),
        ({"prompts": ["a", "b"], "prompt_token_ids": [[1]]}, "2 prompts but 1"),
        ({"prompts": ["a"], "sampling_params": [SamplingParams()] * 2}, "1 prompts but 2"),
        ({"prompts": ["a"], "sampling_params": SamplingParams(logprobs=9)}, "max_logprobs"),
        ({"prompts": [""]}, "empty"),
        ({"prompt_token_ids": [[5, 10**7]]}, "token ids"),
    ],
)
def test_bad_calls_raise_and_leave_nothing_behind(llm, arguments, match):
    with pytest.raises(InvalidRequestError, match=match):
        llm.generate(use_tqdm=False, **arguments)
    assert not llm.llm_engine.has_unfinished_requests()


def test_one_bad_prompt_among_good_ones_leaks_no_request(llm):
    params = [SamplingParams(max_tokens=100, ignore_eos=True), SamplingParams(logprobs=9)]
    with pytest.raises(InvalidRequestError, match="max_logprobs"):
        llm.generate(["good", "bad"], params, use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    assert llm.llm_engine.core.blocks.num_free == llm.llm_engine.core.blocks.num_blocks


def test_a_prompt_that_is_too_long_does_not_harm_the_others(llm):
    fine, long, also_fine = generate(llm, ["ok", "x" * 500, "ok"], temperature=0)
    assert long.outputs[0].finish_reason == "length" and long.outputs[0].text == ""
    assert fine.outputs[0].token_ids == also_fine.outputs[0].token_ids != []


def test_unknown_and_impossible_arguments_fail_at_once(checkpoint):
    with pytest.raises(TypeError, match="gpu_memory_utilisation"):
        make(checkpoint, gpu_memory_utilisation=0.5)
    with pytest.raises(ConfigError, match="max_num_seqs"):
        LLM(str(checkpoint), max_num_seqs=0)


def test_it_works_inside_a_running_loop_and_from_several_threads(llm):
    expected = tokens(generate(llm, temperature=0))

    async def notebook() -> Any:
        return generate(llm, temperature=0)

    assert tokens(asyncio.run(notebook())) == expected
    with ThreadPoolExecutor(4) as pool:
        for outputs in pool.map(lambda _: generate(llm, temperature=0), range(4)):
            assert tokens(outputs) == expected


def test_closing_frees_threads_and_the_model(checkpoint):
    before = threading.active_count()
    llm = make(checkpoint)
    generate(llm, ["a"])
    engine = weakref.ref(llm.llm_engine)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        _ = llm.llm_engine
    gc.collect()
    assert engine() is None
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_deleting_it_frees_the_model_without_the_collector(checkpoint):
    llm = make(checkpoint)
    generate(llm, ["a"])
    engine = weakref.ref(llm.llm_engine)
    gc.collect()
    gc.disable()
    try:
        del llm
        assert engine() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------ sampling through the engine


def test_seeded_draws_do_not_depend_on_neighbours_or_preemption(checkpoint, llm):
    params = [SamplingParams(max_tokens=40, ignore_eos=True, seed=i) for i in range(len(PROMPTS))]
    pairs = zip(PROMPTS, params, strict=True)
    alone = [llm.generate(p, s, use_tqdm=False)[0].outputs[0].token_ids for p, s in pairs]
    together = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in together] == alone
    with make(checkpoint, num_gpu_blocks_override=16) as tight:
        pressed = tight.generate(PROMPTS, params, use_tqdm=False)
        assert tight.llm_engine.core.num_preemptions > 0
    assert [output.outputs[0].token_ids for output in pressed] == alone


def test_unseeded_draws_follow_the_engines_seed(checkpoint):
    def run(seed: int) -> Any:
        with make(checkpoint, seed=seed) as llm:
            return tokens(generate(llm))

    assert run(1) == run(1) != run(2)


def test_siblings_differ_and_equal_seeds_agree(llm):
    (first,) = generate(llm, ["hello"], n=4, seed=5)
    (again,) = generate(llm, ["hello"], n=4, seed=5)
    assert tokens([first]) == tokens([again])
    assert len({tuple(each.token_ids) for each in first.outputs}) == 4
    scores = [each.cumulative_logprob for each in first.outputs]
    assert scores == sorted(scores, reverse=True)
    assert sorted(each.index for each in first.outputs) == [0, 1, 2, 3]
    (best,) = generate(llm, ["hello"], n=2, best_of=4, seed=5)
    assert [each.token_ids for each in best.outputs] == [each.token_ids for each in first.outputs[:2]]


def test_siblings_keep_their_tokens_under_preemption(checkpoint, llm):
    expected = [generate(llm, [p], n=3, seed=9, max_tokens=50)[0] for p in PROMPTS]
    with make(checkpoint, num_gpu_blocks_override=32) as tight:
        pressed = generate(tight, n=3, seed=9, max_tokens=50)
        assert tight.llm_engine.core.num_preemptions > 0
        assert tight.llm_engine.core.blocks.num_free == 32
    assert tokens(pressed) == tokens(expected)


SHARED = "the same beginning for all of them, "
POLICIES = {
    "prefixes": {"enable_prefix_caching": True},
    "prefixes-chunks": {
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 16,
    },
    "prefixes-tight": {"enable_prefix_caching": True, "num_gpu_blocks_override": 24},
    "swap": {"num_gpu_blocks_override": 24, "preemption_mode": "swap", "swap_space": 1},
    "swap-chunks": {
        "num_gpu_blocks_override": 24,
        "preemption_mode": "swap",
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 16,
    },
    "lookahead": {"num_lookahead_slots": 5, "use_v2_block_manager": True},
    "one-by-one": {"enable_prefix_caching": True, "num_gpu_blocks_override": 24, "overlap": 0},
    "everything": {
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 16,
        "num_gpu_blocks_override": 24,
        "preemption_mode": "swap",
        "num_lookahead_slots": 3,
    },
}


@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
def test_policies_change_no_token(checkpoint, llm, options):
    prompts = [SHARED + text for text in PROMPTS]
    drawn = {"n": 2, "seed": 11, "max_tokens": 20}
    greedy = tokens(generate(llm, prompts, temperature=0, max_tokens=20))
    sampled = tokens(generate(llm, prompts, **drawn))
    with make(checkpoint, **options) as engine:
        core = engine.llm_engine.core
        for _ in range(2):  # with an empty cache, and with a full one
            assert tokens(generate(engine, prompts, temperature=0, max_tokens=20)) == greedy
            assert tokens(generate(engine, prompts, **drawn)) == sampled
        core.verify()
        assert core.blocks.num_free == core.blocks.num_blocks
        assert (core.prefix_counts.hits > 0) == ("enable_prefix_caching" in options)
        if "num_gpu_blocks_override" in options:
            assert core.num_preemptions > 0
        assert engine.llm_engine.capacity.num_cpu_blocks > 0 and core.blocks.swap_pool.usage == 0


def test_a_model_whose_layers_all_have_a_window_keeps_no_more_than_that(tmp_path):
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

    folder = tiny_checkpoint.write(tmp_path, weights=True)
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=20,
        initializer_range=0.3,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with make(folder, num_gpu_blocks_override=24) as engine:
        core = engine.llm_engine.core
        assert core.blocks.window == 20
        outputs = generate(engine, PROMPTS, temperature=0, max_tokens=80)
        # Six sequences of up to 110 tokens, 14 blocks of 8 at their end, of which each keeps four.
        assert core.num_preemptions == 0
    for output in outputs:
        ids = torch.tensor([output.prompt_token_ids])
        theirs = oracle.generate(ids, max_new_tokens=80, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert output.outputs[0].token_ids == theirs[0, ids.shape[1] :].tolist()


def test_prompt_logprobs_are_those_of_the_model(checkpoint, llm):
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for options in ({}, {"enable_chunked_prefill": True, "max_num_batched_tokens": 8}):
        with make(checkpoint, **options) as engine:
            outputs = generate(engine, temperature=0, prompt_logprobs=3, max_tokens=2)
        for output in outputs:
            ids = output.prompt_token_ids
            logprobs = torch.log_softmax(oracle(torch.tensor([ids])).logits[0].detach().double(), -1)
            assert len(output.prompt_logprobs) == len(ids) and output.prompt_logprobs[0] is None
            for position, entry in enumerate(output.prompt_logprobs[1:], 1):
                row = logprobs[position - 1]
                assert next(iter(entry)) == ids[position]
                assert entry[ids[position]].rank == int((row > row[ids[position]]).sum()) + 1
                assert len(entry) in (3, 4)
                for token, logprob in entry.items():
                    assert abs(logprob.logprob - float(row[token])) < 1e-4


def test_zero_logprobs_give_the_chosen_token_alone(llm):
    (output,) = generate(llm, ["hello"], logprobs=0, prompt_logprobs=0, temperature=0)
    for token, entry in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
        assert list(entry) == [token]
        assert entry[token].rank == 1
    assert [len(entry) for entry in output.prompt_logprobs[1:]] == [1] * (len(output.prompt_token_ids) - 1)


def test_decoded_tokens_join_to_the_text(llm):
    (output,) = generate(llm, ["hello"], logprobs=2, temperature=0, max_tokens=30)
    joined = "".join(
        entry[token].decoded_token
        for token, entry in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
    )
    assert output.outputs[0].text.startswith(joined)


def test_processors_bias_and_minimum_reach_the_sampler(llm):
    eos = llm.get_tokenizer().eos_token_id
    (forced,) = generate(llm, ["hello"], logit_bias={40: 100.0}, max_tokens=4)
    assert forced.outputs[0].token_ids == [40] * 4

    seen = []

    def only_letters(prompt_ids, output_ids, row):
        seen.append((list(prompt_ids), list(output_ids)))
        row[:] = float("-inf")
        row[50 + len(output_ids)] = 0.0
        return row

    (walked,) = generate(llm, ["hello"], logits_processors=[only_letters], max_tokens=3)
    assert walked.outputs[0].token_ids == [50, 51, 52]
    assert [outputs for _, outputs in seen] == [[], [50], [50, 51]]
    assert seen[0][0] == walked.prompt_token_ids

    params = SamplingParams(max_tokens=9, min_tokens=5, logit_bias={eos: 100.0}, temperature=0)
    (held,) = llm.generate("hello", params, use_tqdm=False)
    assert len(held.outputs[0].token_ids) == 6 and held.outputs[0].token_ids[-1] == eos
    assert held.outputs[0].finish_reason == "stop" and held.outputs[0].stop_reason is None


def test_a_processor_that_fails_ends_its_own_request_alone(llm):
    def broken(output_ids, row):
        if len(output_ids) == 3:
            raise RuntimeError("mine")
        return row

    expected = tokens(generate(llm, ["fine"], temperature=0))
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    bad = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logits_processors=[broken])
    with pytest.raises(RequestFailedError, match="mine"):
        llm.generate(["fine", "bad"], [params, bad], use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    assert tokens(generate(llm, ["fine"], temperature=0)) == expected


def test_skip_tokenizer_init(checkpoint):
    with make(checkpoint, skip_tokenizer_init=True) as llm:
        params = SamplingParams(max_tokens=4, temperature=0)
        (output,) = llm.generate(prompt_token_ids=[[5, 6, 7]], sampling_params=params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 4 and output.outputs[0].text == ""
        with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
            llm.generate("text", params, use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="stop"):
            llm.generate(prompt_token_ids=[[5]], sampling_params=SamplingParams(stop="x"), use_tqdm=False)


def test_detokenize_false_gives_ids_only(llm):
    (output,) = generate(llm, ["hello"], detokenize=False)
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 12


def test_progress_is_shown(llm, capfd):
    llm.generate(["a", "b"], SamplingParams(max_tokens=2), use_tqdm=True)
    shown = capfd.readouterr().err
    assert "Processed prompts" in shown and "toks/s" in shown
