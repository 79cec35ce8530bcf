"""The bases of the floors: bytes a step reads, multiplications it does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from aserve import LLM, SamplingParams
from aserve.bench import checkpoints, limits, weights


@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_is_counted_once(tmp_path: Path, tied: bool) -> None:
    """An untied embedding gives rows only: its head is read instead, and both models read the same."""
    config = checkpoints.LLAMA_1B | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True, dtype="float32") as llm:
        for count in (1, 20):  # what a step writes is no weight, however large it was
            params = SamplingParams(temperature=0, max_tokens=4, detokenize=False)
            llm.generate(prompt_token_ids=[[5, 6, 7]] * count, sampling_params=params, use_tqdm=False)
        found = sum(size for _, size in limits.memory_of(weights.read_by_a_step(llm)))
    layer = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256
    assert found == 4 * (2 * layer + 1024 * 256)


def test_multiplications_of_smollm2() -> None:
    shape = SimpleNamespace(
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        num_hidden_layers=30,
        vocab_size=49152,
    )
    found = weights.multiplications(shape)
    assert found["layers"] == 106_168_320
    assert found["head"] == 28_311_552
    assert found["attention"] == 2 * 576 * 30
    shape.head_dim = 128
    assert weights.multiplications(shape)["attention"] == 2 * 9 * 128 * 30
