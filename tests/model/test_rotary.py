"""Rope parameters in both forms of configuration, and what is said about bad ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aserve.errors import ConfigError
from aserve.model.layers.rotary import make_rotary, rope_parameters


def table(parameters: dict[str, Any], **settings: Any) -> torch.Tensor:
    defaults: dict[str, Any] = {"head_size": 8, "max_position": 32, "max_model_len": 16}
    full = {"rope_type": "default", "rope_theta": 100.0} | parameters
    return make_rotary(full, device=torch.device("cpu"), **(defaults | settings)).cos_sin


def test_table_holds_cosines_then_sines() -> None:
    cos_sin = table({})
    assert cos_sin.shape == (16, 8) and cos_sin.dtype == torch.float32
    angle = 3 * 100.0 ** (-2 / 8)
    assert cos_sin[3, 1].item() == pytest.approx(torch.tensor(angle).cos().item(), abs=1e-6)
    assert cos_sin[3, 5].item() == pytest.approx(torch.tensor(angle).sin().item(), abs=1e-6)


def test_partial_rotation_narrows_the_table() -> None:
    assert table({"partial_rotary_factor": 0.5}).shape == (16, 4)


def test_both_styles_of_configuration_mean_the_same() -> None:
    old = SimpleNamespace(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = SimpleNamespace(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    keys = ("rope_type", "rope_theta", "factor", "partial_rotary_factor")
    old_values, new_values = rope_parameters(old), rope_parameters(new)
    assert [old_values[key] for key in keys] == [new_values[key] for key in keys]
    assert [old_values[key] for key in keys] == ["linear", 5e5, 2.0, 1.0]


def test_defaults_where_a_configuration_says_nothing() -> None:
    assert rope_parameters(SimpleNamespace())["rope_theta"] == 10000.0
    assert rope_parameters(SimpleNamespace(rope_scaling=None))["rope_type"] == "default"


def test_override_keeps_the_base_and_drops_the_rest() -> None:
    config = SimpleNamespace(
        rope_parameters={"rope_type": "llama3", "rope_theta": 7.0, "low_freq_factor": 1.0},
        original_max_position_embeddings=99,
    )
    merged = rope_parameters(config, {"type": "dynamic", "factor": 2.0})
    assert merged["rope_type"] == "dynamic" and merged["rope_theta"] == 7.0
    assert "low_freq_factor" not in merged
    assert merged["original_max_position_embeddings"] == 99


def test_parameters_per_layer_type() -> None:
    config = SimpleNamespace(
        rope_parameters={"sliding_attention": {"rope_theta": 1.5}, "full_attention": {"rope_theta": 2.5}}
    )
    assert rope_parameters(config, None, "sliding_attention")["rope_theta"] == 1.5
    assert rope_parameters(config, {"type": "linear", "factor": 2}, "full_attention")["rope_theta"] == 2.5


def test_su_has_its_own_magnitudes() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    scaling = {"rope_type": "su", "original_max_position_embeddings": 20, **factors}
    plain = table({})
    torch.testing.assert_close(table(scaling), plain * 1.1)
    torch.testing.assert_close(table(scaling, max_model_len=24)[:16], plain * 1.225)
    torch.testing.assert_close(table(scaling | {"short_mscale": 1.5}), plain * 1.5)


def test_yarn_attn_factor_multiplies_the_magnitude() -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    torch.testing.assert_close(table(scaling | {"attn_factor": 3.0}), table(scaling) * 3.0)
    torch.testing.assert_close(
        table(scaling | {"attention_factor": 1.0}) * (0.1 * torch.tensor(2.0).log() + 1), table(scaling)
    )


def test_yarn_without_extrapolation_is_interpolation() -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    yarn = table(scaling | {"extrapolation_factor": 0.0, "attention_factor": 1.0})
    torch.testing.assert_close(yarn, table({"rope_type": "linear", "factor": 2.0}))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "spiral"}, "unknown rope scaling type 'spiral'; known: default, dynamic"),
        ({"rope_type": "linear"}, "type 'linear' needs the key 'factor'"),
        ({"rope_type": "llama3", "factor": 2.0}, "type 'llama3' needs the key 'original_max"),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0],
                "long_factor": [1.0],
                "original_max_position_embeddings": 16,
            },
            "has 1 factors; this model has 4",
        ),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table(parameters)
