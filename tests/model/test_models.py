"""Every family against transformers, through a paged cache, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aserve.errors import ConfigError
from aserve.model.base import Model
from tests.model import tiny
from tests.model.paged import PagedRunner, load, stepwise_logits, whole_logits


def check_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def saved() -> dict[str, Path]:
    return {}


def ours(saved: dict[str, Path], factory: pytest.TempPathFactory, family: str, **settings: Any) -> Model:
    if family not in saved:
        saved[family] = tiny.save(tiny.model(family), factory.mktemp(family))
    return load(saved[family], tiny.model(family).config, settings.pop("max_model_len", 50), **settings)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_whole_prompt_matches_transformers(
    family: str, saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokens = tiny.tokens()
    expected = tiny.reference_logits(tiny.model(family), tokens)
    logits = whole_logits(ours(saved, tmp_path_factory, family), tokens)
    check_close(logits, expected)
    assert logits.std() > 0.1  # the comparison is of something


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_chunked_prefill_then_decode_matches_transformers(
    family: str, block_size: int, saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokens = tiny.tokens()
    expected = tiny.reference_logits(tiny.model(family), tokens)
    model = ours(saved, tmp_path_factory, family)
    logits = stepwise_logits(model, tokens, prompt=27, block_size=block_size, chunk=10)
    check_close(logits, expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "opt"])
def test_rows_of_a_mixed_batch_do_not_see_each_other(
    family: str, saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = ours(saved, tmp_path_factory, family)
    sequences = [tiny.tokens()[start:] for start in (0, 5, 20)]
    runner = PagedRunner(model, 8)
    runner.step([(1, sequences[1][:30]), (2, sequences[2][:12])])
    mixed = runner.step([(0, sequences[0][:17]), (1, [sequences[1][30]]), (2, [sequences[2][12]])])
    for sequence, logits, end in zip(sequences, mixed, (17, 31, 13), strict=True):
        expected = tiny.reference_logits(tiny.model(family), sequence[:end])[-logits.shape[0] :]
        check_close(logits, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_half_precision_stays_close(
    family: str, saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = ours(saved, tmp_path_factory, family, dtype="bfloat16")
    tokens = tiny.tokens()
    expected = tiny.reference_logits(tiny.model(family), tokens)
    logits = whole_logits(model, tokens)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() < 0.02 * expected.std()


@pytest.mark.parametrize(
    ("rope", "length"),
    [({"rope_type": "dynamic", "factor": 2.0}, 90), ({"type": "dynamic", "factor": 3.0}, 120)],
)
def test_dynamic_ntk_past_the_original_length(rope: dict[str, Any], length: int, tmp_path: Path) -> None:
    """transformers sets the base by the longest sequence so far; here it is set by max_model_len."""
    rope_parameters = {"rope_type": "dynamic", "factor": rope["factor"]}
    reference = tiny.make("llama", rope_parameters=rope_parameters)
    tokens = tiny.tokens(length)
    plain = tiny.make("llama")
    tiny.save(plain, tmp_path)
    model = load(tmp_path, plain.config, max_model_len=length, rope_scaling=rope)
    check_close(whole_logits(model, tokens), tiny.reference_logits(reference, tokens))


def test_rope_scaling_argument_replaces_the_models_own(tmp_path: Path) -> None:
    reference = tiny.make("rope-linear", rope_parameters={"rope_type": "linear", "factor": 2.5})
    scaled = tiny.make("rope-llama3")
    scaled.load_state_dict(reference.state_dict())
    tiny.save(scaled, tmp_path)
    model = load(tmp_path, scaled.config, 50, rope_scaling={"type": "linear", "factor": 2.5})
    tokens = tiny.tokens()
    check_close(whole_logits(model, tokens), tiny.reference_logits(reference, tokens))


def test_final_softcap_matches_transformers(tmp_path: Path) -> None:
    reference = tiny.make("gemma3", final_logit_softcapping=3.0)
    tiny.save(reference, tmp_path)
    tokens = tiny.tokens()
    logits = whole_logits(load(tmp_path, reference.config, 50), tokens)
    check_close(logits, tiny.reference_logits(reference, tokens))
    assert logits.abs().max() < 3.0


def test_attention_softcap_bounds_the_scores(tmp_path: Path) -> None:
    """transformers 5.23 reads Gemma 3's attn_logit_softcapping and does not apply it; aserve does."""
    plain = tiny.make("gemma3")
    tiny.save(plain, tmp_path)
    tokens = tiny.tokens()
    plain_logits = whole_logits(load(tmp_path, plain.config, 50), tokens)
    loose, tight = tiny.make("gemma3").config, tiny.make("gemma3").config
    loose.attn_logit_softcapping, tight.attn_logit_softcapping = 1e5, 1e-3
    loose_logits = whole_logits(load(tmp_path, loose, 50), tokens)
    torch.testing.assert_close(loose_logits, plain_logits, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(whole_logits(load(tmp_path, tight, 50), tokens), plain_logits, atol=0.01)


def test_kv_shapes_describe_the_cache(
    saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert ours(saved, tmp_path_factory, "qwen3").kv_shapes == [(2, 16)] * 3
    assert ours(saved, tmp_path_factory, "opt").num_layers == 3


def test_longer_than_opts_positions_is_refused(
    saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(ConfigError, match="64 learned positions"):
        ours(saved, tmp_path_factory, "opt", max_model_len=65)


def test_unknown_activation_is_refused(tmp_path: Path) -> None:
    model = tiny.make("llama")
    tiny.save(model, tmp_path)
    model.config.hidden_act = "relu"
    with pytest.raises(ConfigError, match="activation 'relu' is not supported"):
        load(tmp_path, model.config, 50)
