"""The search itself: against all outputs there are, and against transformers."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aserve.core.beam import Beam, BeamSearch

MODES = list(itertools.product((True, False, "never"), (-0.5, 0.0, 0.7, 1.0, 2.0)))


def run(search, likeliest, ends):
    """What the search finds: ``(tokens, total, score)``; ``likeliest`` gives all next tokens of an output."""
    outputs, totals = [[]], [0.0]
    while not search.done:
        beams = []
        for output, total in zip(outputs, totals, strict=True):
            ids, logprobs = likeliest(output)
            count = search.num_candidates
            beams.append(Beam(total, ids[:count], logprobs[:count]))
        running = list(outputs)
        chosen = search.advance(
            beams,
            lambda candidate: candidate.token_id in ends or search.length == search.max_length,
            lambda candidate, running=running: [*running[candidate.parent], candidate.token_id],
        )
        outputs = [[*running[each.parent], each.token_id] for each in chosen]
        totals = [each.total for each in chosen]
    return [(each.content, each.total, each.score) for each in search.hypotheses]


def distribution(seed, vocab):
    def likeliest(output):
        rng = random.Random(f"{seed} {output}")
        scores = [rng.gauss(0.0, 2.0) for _ in range(vocab)]
        norm = math.log(sum(map(math.exp, scores)))
        ranked = sorted(((score - norm, token) for token, score in enumerate(scores)), reverse=True)
        return [token for _, token in ranked], [logprob for logprob, _ in ranked]

    return likeliest


@pytest.mark.parametrize("length_penalty", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_so_wide_a_search_finds_the_best_of_all_outputs(seed, length_penalty):
    vocab, longest, end = 4, 5, 2
    likeliest = distribution(seed, vocab)
    everything = []
    open_outputs = [([], 0.0)]
    while open_outputs:
        output, total = open_outputs.pop()
        for token, logprob in zip(*likeliest(output), strict=True):
            longer = ([*output, token], total + logprob)
            if token == end or len(longer[0]) == longest:
                everything.append((longer[1] / len(longer[0]) ** length_penalty, *longer))
            else:
                open_outputs.append(longer)
    everything.sort(key=lambda entry: -entry[0])
    width = len(everything)
    found = run(BeamSearch(width, longest, length_penalty, "never"), likeliest, {end})
    assert len(found) == width == 364
    for (tokens, total, score), (best, best_tokens, best_total) in zip(found, everything, strict=True):
        assert tokens == best_tokens
        assert math.isclose(total, best_total) and math.isclose(score, best)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_no_output_that_is_better_is_missed_by_never(length_penalty):
    """Whatever the width, stopping early loses nothing that going on to the end would have found."""
    for seed in range(20):
        likeliest = distribution(seed, 6)
        search = BeamSearch(3, 12, length_penalty, "never")
        early = run(search, likeliest, {2})

        class Endless(BeamSearch):
            def _enough(self, best):
                return False

        late = run(Endless(3, 12, length_penalty, "never"), likeliest, {2})
        assert early == late
        assert search.length <= 12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.9,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def known():
    """What the model says after tokens, as far as anybody asked."""
    return {}


@pytest.mark.parametrize(("early_stopping", "length_penalty"), MODES)
@torch.inference_mode()
def test_transformers_finds_the_same(model, known, early_stopping, length_penalty):
    for prompt, width, longest, ends in (
        ([5, 6, 7], 2, 9, [3, 17, 21, 22]),
        ([5, 6, 7], 5, 9, [3]),
        ([30, 2], 4, 12, [3, 17]),
        ([30, 2], 3, 1, [3, 17, 21, 22]),
    ):
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=longest,
            eos_token_id=ends,
            pad_token_id=-1,
            output_scores=True,
            return_dict_in_generate=True,
            early_stopping=early_stopping,
            length_penalty=length_penalty,
        )
        rows = [row[len(prompt) :] for row in found.sequences.tolist()]
        expected = [[token for token in row if token != -1] for row in rows]

        def likeliest(output, prompt=prompt):
            ids = (*prompt, *output)
            if ids not in known:
                values, order = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).sort(descending=True)
                known[ids] = order.tolist(), values.tolist()
            return known[ids]

        search = BeamSearch(width, longest, length_penalty, early_stopping, len(ends))
        got = run(search, likeliest, ends)
        assert [tokens for tokens, _, _ in got] == expected
        scores = found.sequences_scores.tolist()
        assert [score for _, _, score in got] == pytest.approx(scores, rel=1e-5, abs=1e-5)


def beam(total, **logprobs):
    return Beam(total, [ord(name) for name in logprobs], list(logprobs.values()))


def ends_with(*names):
    return lambda candidate: chr(candidate.token_id) in names


def name(candidate):
    return f"{candidate.parent}{chr(candidate.token_id)}"


def test_only_the_likeliest_candidates_may_end():
    search = BeamSearch(2, 10)
    chosen = search.advance([beam(0.0, a=-1.0, b=-2.0, x=-3.0, c=-4.0)], ends_with("x"), name)
    assert [name(each) for each in chosen] == ["0a", "0b"] and search.hypotheses == []
    chosen = search.advance(
        [beam(-1.0, x=-0.5, a=-3.0), beam(-2.0, b=-1.0, x=-1.5, c=-4.0)], ends_with("x"), name
    )
    assert [name(each) for each in chosen] == ["1b", "0a"]
    assert [(each.content, each.total, each.score, each.length) for each in search.hypotheses] == [
        ("0x", -1.5, -0.75, 2)
    ]


def test_forbidden_tokens_are_no_candidates():
    search = BeamSearch(3, 10)
    chosen = search.advance([beam(0.0, a=-1.0, b=float("-inf"))], ends_with(), name)
    assert [name(each) for each in chosen] == ["0a"]
    assert search.advance([beam(-1.0, x=-1.0)], ends_with("x"), name) == []
    assert search.done and [each.content for each in search.hypotheses] == ["0x"]


@pytest.mark.parametrize(
    ("early_stopping", "later", "at_once"), [(True, 1, 1), (False, 0, 1), ("never", 0, 0)]
)
def test_when_a_search_with_as_many_hypotheses_as_beams_is_over(early_stopping, later, at_once):
    # One hypothesis is old and bad, and what runs is better than that.
    search = BeamSearch(2, 10, 2.0, early_stopping)
    search.advance([beam(0.0, a=-0.1, x=-3.0, b=-5.0)], ends_with("x"), name)
    search.advance([beam(-0.1, c=-2.8, x=-2.95), beam(-5.0, d=-4.5)], ends_with("x"), name)
    assert len(search.hypotheses) == 2 and search.done is bool(later)
    # Both have just ended, so that what runs is worse; not if it goes on for long.
    search = BeamSearch(2, 10, 2.0, early_stopping)
    search.advance([beam(0.0, a=-0.1, b=-5.0)], ends_with("x"), name)
    search.advance(
        [beam(-0.1, x=-3.0, y=-4.0, c=-4.5, d=-5.0), beam(-5.0, z=-9.0)], ends_with("x", "y"), name
    )
    assert len(search.hypotheses) == 2 and search.done is bool(at_once)


def test_candidates_are_enough_for_every_ending_token():
    assert BeamSearch(3, 5, num_ends=0).num_candidates == 6
    assert BeamSearch(3, 5, num_ends=1).num_candidates == 6
    assert BeamSearch(3, 5, num_ends=4).num_candidates == 15
