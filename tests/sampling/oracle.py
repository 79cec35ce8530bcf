"""What sampling one row has to do, written down once more: one row at a time, plainly, in NumPy.

Elementwise steps are rounded to float32 as the definition says; everything that adds up is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from aserve.messages.params import SamplingParams

F32 = np.float32
MASK = (1 << 64) - 1
EOS = 2
SLACK = 2e-6
"""Share of the probability mass within which float32 may decide either way."""


def uniform(seed: int, position: int) -> float:
    """SplitMix64 in Python's integers."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return float((z ^ (z >> 31)) >> 11) / 2.0**53


def favour_length(output_ids: list[int], row: torch.Tensor) -> torch.Tensor:
    """Favours one token that depends on how much has been generated."""
    row[len(output_ids) % len(row)] += 2.0
    return row


def copy_prompt(prompt_ids: list[int], output_ids: list[int], row: torch.Tensor) -> torch.Tensor:
    """Favours the prompt's next token; forbids the token generated last."""
    row = row.clone()
    row[prompt_ids[len(output_ids) % len(prompt_ids)]] += 1.5
    if output_ids:
        row[output_ids[-1]] = float("-inf")
    return row


@dataclass
class Expected:
    scores: np.ndarray
    """After temperature, float32."""
    sure: np.ndarray
    """Tokens that must be kept."""
    possible: np.ndarray
    """Tokens that may be kept."""


@dataclass
class Case:
    """One sequence: what it is sampled with and what it has seen."""

    params: SamplingParams
    seed: int
    prompt: list[int]
    output: list[int]


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max()
    with np.errstate(divide="ignore"):
        return shifted - np.log(np.exp(shifted).sum())


def edited(row: np.ndarray, case: Case) -> np.ndarray:
    """Bias, processors, the mask of min_tokens, penalties: float32."""
    params, row = case.params, row.astype(F32).copy()
    for token, bias in (params.logit_bias or {}).items():
        row[token] += F32(bias)
    for processor in params.logits_processors or ():
        arguments = (case.prompt, case.output) if processor is copy_prompt else (case.output,)
        row = processor(*map(list, arguments), torch.from_numpy(row.copy())).numpy()
    if len(case.output) < params.min_tokens:
        for token in {EOS, *(params.stop_token_ids or ())}:
            row[token] = -np.inf
    for token in set(case.prompt) | set(case.output):
        repetition = F32(params.repetition_penalty)
        row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
    for token in set(case.output):
        row[token] -= F32(params.frequency_penalty) * F32(case.output.count(token))
        row[token] -= F32(params.presence_penalty)
    return row


def expected(row: np.ndarray, case: Case) -> Expected:
    params = case.params
    scores = edited(row, case)
    if params.temperature >= 1e-5:
        scores = scores / F32(params.temperature)
    return truncated(scores, params.top_k, params.top_p, params.min_p)


def truncated(scores: np.ndarray, top_k: int, top_p: float, min_p: float) -> Expected:
    """Top-k with ties, then top-p on what is left, then min-p."""
    vocab = len(scores)
    exact = scores.astype(np.float64)
    possible = np.ones(vocab, dtype=bool)
    if 0 < top_k < vocab:
        possible = scores >= np.sort(scores)[vocab - top_k]
    sure = possible.copy()
    if top_p < 1.0:
        probs = np.exp(log_softmax(np.where(possible, exact, -np.inf)))
        order = np.lexsort((np.arange(vocab), -exact))  # likeliest first, equals by id
        order = order[possible[order]]
        before = np.concatenate([[0.0], np.cumsum(probs[order])[:-1]])
        sure, possible = np.zeros(vocab, dtype=bool), np.zeros(vocab, dtype=bool)
        sure[order[before < top_p - SLACK]] = True
        possible[order[before < top_p + SLACK]] = True
        sure[order[0]] = possible[order[0]] = True
    if min_p > 0.0:
        distance = exact - exact.max() - np.log(min_p)
        tolerance = 1e-5 * max(1.0, float(np.abs(exact[np.isfinite(exact)]).max()))
        sure &= distance >= (tolerance if min_p < 1.0 else 0.0)
        possible &= distance >= (-tolerance if min_p < 1.0 else 0.0)
    allowed = np.isfinite(scores)
    return Expected(scores, sure & allowed, possible & allowed)


def cases(vocab: int, logprobs: bool = True) -> st.SearchStrategy[Case]:
    """Sequences with every mixture of parameters. ``logprobs``: ask for the whole distribution."""
    token = st.integers(0, vocab - 1)

    def build(**drawn: object) -> Case:
        params = SamplingParams(max_tokens=50, logprobs=vocab if logprobs else None, **drawn["params"])  # type: ignore[arg-type]
        return Case(params, drawn["seed"], drawn["prompt"], drawn["output"])  # type: ignore[arg-type]

    def some(neutral: object, *others: object) -> st.SearchStrategy[object]:
        return st.one_of(st.just(neutral), st.sampled_from(others))

    params = st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([1.0, 0.0, 0.1, 0.7, 3.0]),
            "top_k": some(-1, 1, 2, 7, vocab - 1, vocab, vocab + 9),
            "top_p": some(1.0, 1e-4, 0.3, 0.5, 0.9, 0.999),
            "min_p": some(0.0, 0.02, 0.3, 1.0),
            "repetition_penalty": some(1.0, 0.5, 1.3, 2.0),
            "frequency_penalty": some(0.0, -1.0, 0.3, 2.0),
            "presence_penalty": some(0.0, -2.0, 0.7, 2.0),
            "min_tokens": some(0, 1, 3),
            "stop_token_ids": st.lists(token, max_size=2),
            "logit_bias": st.one_of(st.none(), st.dictionaries(token, st.sampled_from([-100.0, -1.0, 3.0]))),
            "logits_processors": st.lists(st.sampled_from([favour_length, copy_prompt]), max_size=2),
        }
    )
    return st.builds(
        build,
        params=params,
        seed=st.integers(0, MASK),
        prompt=st.lists(token, min_size=1, max_size=6),
        output=st.lists(token, max_size=5),
    )


@st.composite
def logits(draw: st.DrawFn, vocab: int, rows: int) -> np.ndarray:
    """``[rows, vocab]`` in float32: peaked to flat, with ties, or with tokens ruled out."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    made = rng.normal(size=(rows, vocab)) * draw(st.sampled_from([0.02, 1.0, 4.0]))
    if draw(st.booleans()):
        made = np.round(made * 2) / 2
    if draw(st.booleans()):
        # Tokens that the parameters above cannot rule out stay allowed, so that some token always is.
        made[rng.random((rows, vocab)) < 0.3] = -np.inf
        made[:, vocab // 3 : vocab // 3 + 16] = 1.0
    return made.astype(F32)
