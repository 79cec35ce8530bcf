"""Features that are not built are refused by one sentence that names the argument and a way out."""

from __future__ import annotations

from typing import Any

import pytest

from aserve import registry
from aserve.config.unbuilt import ROWS
from aserve.errors import ConfigError, UnsupportedError
from tests.config.conftest import Resolve

AWQ_CHECKPOINT = {"quantization_config": {"quant_method": "awq", "bits": 4}}

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("enable_lora", {"enable_lora": True}),
    (
        "speculative_model",
        {
            "speculative_model": "[ngram]",
            "num_speculative_tokens": 2,
            "ngram_prompt_lookup_max": 2,
            "use_v2_block_manager": True,
        },
    ),
    (
        "image_input_type",
        {
            "image_input_type": "image_features",
            "image_token_id": 3,
            "image_input_shape": "1,2",
            "image_feature_size": 4,
        },
    ),
    ("worker_use_ray", {"worker_use_ray": True}),
    ("tensor_parallel_size", {"tensor_parallel_size": 2}),
    ("pipeline_parallel_size", {"pipeline_parallel_size": 2}),
    ("distributed_executor_backend", {"distributed_executor_backend": "ray"}),
    ("distributed_executor_backend", {"distributed_executor_backend": "mp"}),
    ("engine_use_ray", {"engine_use_ray": True}),
    ("max_parallel_loading_workers", {"max_parallel_loading_workers": 2}),
    ("quantization", {"config": AWQ_CHECKPOINT}),
    ("quantization", {"quantization": "fp8"}),
    ("kv_cache_dtype", {"kv_cache_dtype": "fp8"}),
    ("kv_cache_dtype", {"kv_cache_dtype": "fp8_e4m3"}),
    ("quantization_param_path", {"quantization_param_path": "scales.json"}),
    ("tokenizer_pool_size", {"tokenizer_pool_size": 2}),
    ("load_format", {"load_format": "npcache"}),
    ("load_format", {"load_format": "tensorizer", "model_loader_extra_config": '{"tensorizer_uri": "x"}'}),
]


@pytest.mark.parametrize(("param", "arguments"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused(param: str, arguments: dict[str, Any], resolve: Resolve) -> None:
    with pytest.raises(UnsupportedError) as caught:
        resolve(**arguments)
    assert caught.value.param == param
    message = str(caught.value)
    assert message.startswith(param) and "is not built in this release; " in message
    assert "\n" not in message and not message.endswith(".")


def test_every_row_is_tested() -> None:
    assert {row.argument for row in ROWS} == {param for param, _ in REFUSED}


@pytest.mark.parametrize(
    "arguments",
    [
        {"enable_chunked_prefill": True},
        {"max_num_seqs": 4},
        {"max_num_batched_tokens": 4096},
        {"scheduler_delay_factor": 0.5},
        {"use_v2_block_manager": True},
        {"swap_space": 0},
        {"swap_space": 4},
        {"overlap": 0},
        {"enforce_eager": True},
        {"max_seq_len_to_capture": 1024},
        {"disable_custom_all_reduce": True},
        {"guided_decoding_backend": "outlines"},
        {"guided_decoding_backend": "lm-format-enforcer"},
        {"disable_log_stats": True},
        {"disable_log_requests": True},
        {"max_log_len": 0},
        {"load_format": "dummy"},
        {"load_format": "safetensors"},
        {"load_format": "pt"},
        {"num_gpu_blocks_override": 500},
        {"block_size": 8},
        {"block_size": 32},
    ],
    ids=str,
)
def test_accepted(arguments: dict[str, Any], resolve: Resolve) -> None:
    assert resolve(**arguments).device.device == "cpu"


def test_names_without_an_implementation_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"executor 'ray' is not built in this release; built: uni"):
        registry.executors.load("ray")
    with pytest.raises(ConfigError, match=r"unknown executor 'x'; known: mp, ray, uni"):
        registry.executors.load("x")
    monkeypatch.setattr(registry.executors, "_table", dict(registry.executors._table))
    registry.executors.register("ray", "json:dumps")
    assert registry.executors.built("ray") and registry.executors.load("ray")({}) == "{}"
    with pytest.raises(ConfigError, match="expected 'module:attribute'"):
        registry.executors.register("other", "json.dumps")


def test_an_implementation_from_outside_lifts_the_refusal(
    resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.loaders, "_table", {**registry.loaders._table, "npcache": "mine:Loader"})
    assert resolve(load_format="npcache").load.load_format == "npcache"
