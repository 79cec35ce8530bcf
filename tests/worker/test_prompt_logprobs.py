"""The log-probabilities of a long prompt, in bounded memory."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from aserve import LLM, SamplingParams
from aserve.model.base import Model
from aserve.worker import runner
from tests import tiny_checkpoint

LENGTH = 1000
CEILING = 64
"""Rows of logits that there may be at once."""


class AliveRows:
    """Counts the rows of logits that ``compute_logits`` has made and that still exist.

    Memory itself cannot be asked for: torch's is not seen by Python.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = self.made = 0
        real = Model.compute_logits

        def compute_logits(
            model: Model, hidden: torch.Tensor, out: torch.Tensor | None = None
        ) -> torch.Tensor:
            logits = real(model, hidden, out)
            rows = logits.shape[0]
            self.now += rows
            self.made += rows
            self.most = max(self.most, self.now)
            weakref.finalize(logits, self._freed, rows)
            return logits

        monkeypatch.setattr(Model, "compute_logits", compute_logits)

    def _freed(self, rows: int) -> None:
        self.now -= rows


def test_a_long_prompt_has_few_logits_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint.write(tmp_path, max_position_embeddings=LENGTH + 8, weights=True)
    params = SamplingParams(prompt_logprobs=2, max_tokens=1, temperature=0)
    prompt = {"prompt_token_ids": [3 + i * i % 200 for i in range(LENGTH)]}
    with LLM(str(tmp_path), dtype="float32", max_num_batched_tokens=4096) as llm:
        (whole,) = llm.generate([prompt], params, use_tqdm=False)
        vocab = llm.llm_engine.config.model.vocab_size
        rows = AliveRows(monkeypatch)
        monkeypatch.setattr(runner, "_LOGITS_BYTES", CEILING * 4 * vocab)
        outputs = llm.generate([prompt, prompt], params, use_tqdm=False)
    assert rows.made >= 2 * (LENGTH - 1)
    # Of the prompts', and of the tokens drawn: one for each request.
    assert CEILING <= rows.most <= CEILING + 2
    assert rows.now <= 2  # the worker keeps the memory of those that tokens were drawn from
    assert whole.prompt_logprobs is not None and len(whole.prompt_logprobs) == LENGTH
    for output in outputs:
        assert output.prompt_logprobs is not None
        for found, expected in zip(output.prompt_logprobs[1:], whole.prompt_logprobs[1:], strict=True):
            assert found is not None and expected is not None
            assert [*found] == [*expected]
            for token, entry in found.items():
                assert entry.logprob == pytest.approx(expected[token].logprob, abs=1e-4)
