"""Every rule on a value, each by the argument its error names."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aserve.args import EngineArgs
from aserve.config import cache as cache_module
from aserve.config.device import DeviceConfig, resolve_device_config
from aserve.config.hf import uniform_window
from aserve.config.lora import resolve_lora_config
from aserve.config.parallel import resolve_parallel_config
from aserve.config.scheduler import resolve_scheduler_config
from aserve.config.speculative import resolve_speculative_config
from aserve.config.tokenizer_pool import resolve_tokenizer_pool_config
from aserve.config.vision import VisionLanguageConfig, resolve_vision_config
from aserve.errors import ConfigError, UnsupportedError
from aserve.model.base import layer_window
from tests.config.conftest import MakeModel, Resolve

CPU = DeviceConfig("cpu")
LORA: dict[str, Any] = {"enable_lora": True}
NGRAM: dict[str, Any] = {
    "speculative_model": "[ngram]",
    "num_speculative_tokens": 3,
    "use_v2_block_manager": True,
}
IMAGE: dict[str, Any] = {
    "image_input_type": "pixel_values",
    "image_token_id": 5,
    "image_input_shape": "1,3,4,4",
    "image_feature_size": 7,
}
POOL: dict[str, Any] = {"tokenizer_pool_size": 2}

BAD_VALUES: list[tuple[str, dict[str, Any]]] = [
    ("model", {"model": ""}),
    ("model", {"model": "/no/such/model.gguf"}),
    ("seed", {"seed": "1"}),
    ("seed", {"seed": True}),
    ("seed", {"seed": -1}),
    ("max_num_seqs", {"max_num_seqs": 1.5}),
    ("served_model_name", {"served_model_name": [1]}),
    ("served_model_name", {"served_model_name": [""]}),
    ("rope_scaling", {"rope_scaling": '{"type": "linear"}'}),
    ("tokenizer_mode", {"tokenizer_mode": "fast"}),
    ("load_format", {"load_format": "zip"}),
    ("load_format", {"load_format": "gguf"}),
    ("dtype", {"dtype": "float8"}),
    ("max_model_len", {"max_model_len": 0}),
    ("max_model_len", {"max_model_len": 2049}),
    ("max_logprobs", {"max_logprobs": -1}),
    ("model_loader_extra_config", {"model_loader_extra_config": {"a": 1}}),
    ("model_loader_extra_config", {"model_loader_extra_config": "{"}),
    ("model_loader_extra_config", {"model_loader_extra_config": "[1]", "load_format": "tensorizer"}),
    ("max_context_len_to_capture", {"max_context_len_to_capture": 8192}),
    ("max_seq_len_to_capture", {"max_seq_len_to_capture": 0}),
    ("device", {"device": "tpu"}),
    ("gpu_memory_utilization", {"gpu_memory_utilization": 1.01}),
    ("gpu_memory_utilization", {"gpu_memory_utilization": 0.0}),
    ("block_size", {"block_size": 0}),
    ("kv_cache_dtype", {"kv_cache_dtype": "int8"}),
    ("num_gpu_blocks_override", {"num_gpu_blocks_override": 0}),
    ("num_gpu_blocks_override", {"num_gpu_blocks_override": 127}),
    ("swap_space", {"swap_space": -1}),
    ("swap_space", {"swap_space": 1 << 30}),
    ("tensor_parallel_size", {"tensor_parallel_size": 0}),
    ("tensor_parallel_size", {"tensor_parallel_size": 3}),
    ("pipeline_parallel_size", {"pipeline_parallel_size": 0}),
    ("pipeline_parallel_size", {"pipeline_parallel_size": 3}),
    ("max_parallel_loading_workers", {"max_parallel_loading_workers": 0}),
    ("distributed_executor_backend", {"distributed_executor_backend": "uni"}),
    ("worker_use_ray", {"worker_use_ray": True, "distributed_executor_backend": "mp"}),
    ("ray_workers_use_nsight", {"ray_workers_use_nsight": True}),
    ("max_num_batched_tokens", {"max_num_batched_tokens": 2047}),
    ("max_num_batched_tokens", {"max_num_batched_tokens": 255, "enable_chunked_prefill": True}),
    ("max_num_batched_tokens", {"max_num_batched_tokens": 65529, **LORA}),
    ("max_num_seqs", {"max_num_seqs": 0}),
    ("scheduler_delay_factor", {"scheduler_delay_factor": -0.1}),
    ("scheduler_delay_factor", {"scheduler_delay_factor": float("nan")}),
    ("num_lookahead_slots", {"num_lookahead_slots": -1}),
    ("overlap", {"overlap": 2}),
    ("preemption_mode", {"preemption_mode": "drop"}),
    ("preemption_mode", {"preemption_mode": "swap", "swap_space": 0}),
    ("max_waiting_requests", {"max_waiting_requests": 0}),
    ("max_waiting_tokens", {"max_waiting_tokens": 0}),
    ("num_scheduler_steps", {"num_scheduler_steps": 0}),
    ("max_decode_slowdown", {"max_decode_slowdown": 1.0}),
    ("max_decode_slowdown", {"max_decode_slowdown": float("inf")}),
    ("tokenizer_pool_size", {"tokenizer_pool_size": -1}),
    ("tokenizer_pool_type", {**POOL, "tokenizer_pool_type": "fork"}),
    ("tokenizer_pool_extra_config", {**POOL, "tokenizer_pool_extra_config": "3"}),
    ("guided_decoding_backend", {"guided_decoding_backend": "regex"}),
    ("guided_compile_timeout", {"guided_compile_timeout": 0}),
    ("guided_compile_timeout", {"guided_compile_timeout": float("nan")}),
    ("guided_cache_size", {"guided_cache_size": -1}),
    ("max_log_len", {"max_log_len": -1}),
    ("max_lora_rank", {**LORA, "max_lora_rank": 7}),
    ("max_loras", {**LORA, "max_loras": 0}),
    ("lora_extra_vocab_size", {**LORA, "lora_extra_vocab_size": 1}),
    ("lora_dtype", {**LORA, "lora_dtype": "int8"}),
    ("max_cpu_loras", {**LORA, "max_loras": 4, "max_cpu_loras": 3}),
    ("long_lora_scaling_factors", {**LORA, "long_lora_scaling_factors": (4.0, 0.0)}),
    ("speculative_model", {"num_speculative_tokens": 3}),
    ("num_speculative_tokens", {"speculative_model": "[ngram]"}),
    ("num_speculative_tokens", {**NGRAM, "num_speculative_tokens": 0, "ngram_prompt_lookup_max": 2}),
    ("ngram_prompt_lookup_max", NGRAM),
    ("ngram_prompt_lookup_max", {**NGRAM, "ngram_prompt_lookup_max": 0}),
    ("ngram_prompt_lookup_min", {**NGRAM, "ngram_prompt_lookup_max": 2, "ngram_prompt_lookup_min": 3}),
    ("ngram_prompt_lookup_min", {**NGRAM, "ngram_prompt_lookup_max": 2, "ngram_prompt_lookup_min": 0}),
    ("image_input_type", {**IMAGE, "image_input_type": "video"}),
    ("image_token_id", {**IMAGE, "image_token_id": None}),
    ("image_input_shape", {**IMAGE, "image_input_shape": ""}),
    ("image_input_shape", {**IMAGE, "image_input_shape": "1,3,x"}),
    ("image_feature_size", {**IMAGE, "image_feature_size": 0}),
    ("quantization", {"quantization": "int3"}),
    ("quantization", {"quantization": "gguf"}),
]


@pytest.mark.parametrize(("param", "arguments"), BAD_VALUES, ids=lambda value: str(value)[:60])
def test_bad_value_is_named(param: str, arguments: dict[str, Any], resolve: Resolve) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(**arguments)
    assert caught.value.param == param
    assert param in str(caught.value)
    assert not isinstance(caught.value, UnsupportedError), "a bad value comes before a missing feature"


def test_defaults_resolve(resolve: Resolve) -> None:
    config = resolve()
    assert config.scheduler.max_num_batched_tokens == config.scheduler.max_model_len == 2048
    assert (config.scheduler.max_num_seqs, config.scheduler.overlap) == (256, 1)
    assert config.parallel.executor == "uni" and config.parallel.world_size == 1
    assert config.cache.swap_space_bytes == 4 << 30
    assert config.cache.cpu_kvcache_bytes is None
    assert config.load.load_format == "auto" and config.load.extra_config == {}
    optional = (config.lora, config.vision_language, config.speculative, config.tokenizer_pool)
    assert optional == (None,) * 4
    assert config.decoding.guided_decoding_backend == "llguidance"


# --- device


@pytest.mark.parametrize("present", [False, True])
def test_auto_device(present: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: present)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    expected = DeviceConfig("cuda", (9, 0), 2) if present else DeviceConfig("cpu")
    assert resolve_device_config(EngineArgs("m")) == expected
    if present:
        assert resolve_device_config(EngineArgs("m", device="cuda")) == expected


def test_absent_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("cuda", "neuron"):
        with pytest.raises(UnsupportedError, match=f"device '{name}'") as caught:
            resolve_device_config(EngineArgs("m", device=name))
        assert "use 'cpu'" in str(caught.value)


def test_neuron_cores_are_not_served_even_where_torch_could(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch_neuronx.py").write_text("raise RuntimeError('only looked for, never imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UnsupportedError, match="installed, but this release has no paged KV cache") as caught:
        resolve_device_config(EngineArgs("m", device="neuron"))
    assert caught.value.param == "device"


# --- cache


@pytest.mark.parametrize(
    ("ours", "other", "expected"),
    [
        (None, None, None),
        ("0", None, None),
        ("", "2", 2.0),
        ("1.5", "2", 1.5),
        ("0", "2", None),
    ],
)
def test_cpu_cache_size(
    ours: str | None, other: str | None, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(cache_module.CPU_KVCACHE_VARIABLES, (ours, other), strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert cache_module.cpu_kvcache_bytes() == (None if expected is None else int(expected * 2**30))


@pytest.mark.parametrize("text", ["-1", "lots", "nan", "inf"])
@pytest.mark.parametrize("name", ["ASERVE_CPU_KVCACHE_SPACE", "VLLM_CPU_KVCACHE_SPACE"])
def test_cpu_cache_size_that_makes_no_sense(
    name: str, text: str, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=name):
        resolve()


def test_swap_space_against_host_memory(
    resolve: Resolve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module, "total_memory_bytes", lambda: 10 << 30)
    with pytest.raises(ConfigError, match=r"8\.0 GiB of swap space is more than 70%"):
        resolve(swap_space=8)
    with caplog.at_level(logging.WARNING, "aserve"):
        assert resolve(swap_space=5).cache.swap_space_bytes == 5 << 30
    assert "swap space takes 5.0 GiB" in caplog.text
    with pytest.raises(ConfigError, match=r"10\.0 GiB of swap space"):
        resolve(swap_space=5, tensor_parallel_size=2)


def test_default_swap_space_never_refuses_a_small_machine(
    resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "total_memory_bytes", lambda: 2 << 30)
    assert resolve().cache.swap_space_bytes == 4 << 30
    assert resolve(swap_space=0).cache.swap_space_bytes == 0


def test_block_override_must_hold_one_sequence(resolve: Resolve) -> None:
    assert resolve(num_gpu_blocks_override=128).cache.num_gpu_blocks_override == 128
    assert resolve(num_gpu_blocks_override=4, max_model_len=64).cache.num_gpu_blocks_override == 4
    with pytest.raises(ConfigError, match="allow 256 blocks or lower max_model_len"):
        resolve(num_gpu_blocks_override=255, block_size=8)


def test_fp8_e5m2_cache_with_an_fp8_checkpoint(resolve: Resolve) -> None:
    quantized = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
    with pytest.raises(ConfigError, match="fp8_e5m2 does not go with an fp8 checkpoint"):
        resolve(config=quantized, kv_cache_dtype="fp8_e5m2")


def test_prefix_caching_with_sliding_windows(resolve: Resolve) -> None:
    window = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64}
    with pytest.raises(ConfigError, match="sliding window") as caught:
        resolve(config=window, enable_prefix_caching=True)
    assert caught.value.param == "enable_prefix_caching"
    assert resolve(config=window, enable_chunked_prefill=True).scheduler.enable_chunked_prefill
    left_open = {"enable_prefix_caching": None, "enable_chunked_prefill": None}
    assert not resolve(config=window, **left_open).cache.enable_prefix_caching
    assert resolve(**left_open).cache.enable_prefix_caching
    assert resolve(**left_open).scheduler.enable_chunked_prefill
    assert resolve(**left_open).scheduler.max_num_batched_tokens == 512
    # Where some layers see everything, all blocks are kept anyway.
    mixed = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window": 64,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    assert resolve(config=mixed, enable_prefix_caching=True).cache.enable_prefix_caching
    assert resolve(config=mixed).model.sliding_window == 64
    assert resolve(config=mixed).model.uniform_window is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"sliding_window": 64}, 64),
        ({"sliding_window": 64, "use_sliding_window": False}, None),
        ({"sliding_window": 64, "max_window_layers": 1}, None),
        ({"sliding_window": 64, "max_window_layers": 0}, 64),
        ({"sliding_window": 64, "layer_types": ["sliding_attention"] * 2}, 64),
        ({"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}, None),
    ],
)
def test_a_window_is_uniform_if_every_layer_of_the_model_has_it(
    config: dict[str, Any], expected: int | None
) -> None:
    windows = {layer_window(SimpleNamespace(**config), layer) for layer in range(2)}
    assert uniform_window(SimpleNamespace(**config)) == expected
    assert (windows == {expected}) if expected else (len(windows) > 1 or windows == {None})


# --- scheduler


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ({}, 2048),
        ({"max_model_len": 100}, 2048),
        ({"enable_chunked_prefill": True}, 512),
        ({"enable_chunked_prefill": True, "max_num_seqs": 600}, 600),
        ({"max_num_seqs": 3000}, 3000),
        ({"max_num_batched_tokens": 2048}, 2048),
        ({"max_num_batched_tokens": 256, "enable_chunked_prefill": True}, 256),
    ],
)
def test_token_budget(arguments: dict[str, Any], tokens: int, resolve: Resolve) -> None:
    assert resolve(**arguments).scheduler.max_num_batched_tokens == tokens


def test_token_budget_follows_a_long_context(resolve: Resolve) -> None:
    assert resolve(config={"max_position_embeddings": 5000}).scheduler.max_num_batched_tokens == 5000


def test_scheduler_fields(resolve: Resolve) -> None:
    scheduler = resolve(max_num_seqs=3, scheduler_delay_factor=0.5, overlap=0, max_model_len=77).scheduler
    assert (scheduler.max_num_seqs, scheduler.delay_factor, scheduler.overlap) == (3, 0.5, 0)
    assert scheduler.max_model_len == 77


# --- parallel


def test_executor_choice(resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resolve().model
    gpus = DeviceConfig("cuda", (9, 0), 2)

    def executor(device: DeviceConfig = gpus, **arguments: Any) -> str:
        return resolve_parallel_config(EngineArgs("m", **arguments), model, device).executor

    for installed, expected in ((object(), "ray"), (None, "mp")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=installed: found)
        assert executor(tensor_parallel_size=2) == expected
    assert executor() == "uni"
    assert executor(worker_use_ray=True) == "ray"
    assert executor(worker_use_ray=True, distributed_executor_backend="ray") == "ray"
    assert executor(distributed_executor_backend="ray", ray_workers_use_nsight=True) == "ray"
    assert executor(distributed_executor_backend="mp") == "mp"
    with pytest.raises(ConfigError, match="runs 4 workers and there are 2"):
        executor(distributed_executor_backend="mp", tensor_parallel_size=4)
    four = DeviceConfig("cuda", (9, 0), 4)
    with pytest.raises(ConfigError, match="does not divide the model's 4 attention heads"):
        executor(four, tensor_parallel_size=3)
    with pytest.raises(ConfigError, match="does not divide the model's 2 layers"):
        executor(four, pipeline_parallel_size=3)


# --- LoRA


def test_lora_values(resolve: Resolve, caplog: pytest.LogCaptureFixture) -> None:
    config = resolve()

    def lora(**arguments: Any) -> Any:
        return resolve_lora_config(EngineArgs("m", **arguments), config.model, config.scheduler)

    assert lora(max_lora_rank=7) is None
    found = lora(**LORA, max_loras=2)
    assert (found.max_cpu_loras, found.lora_dtype, found.max_lora_rank) == (2, "bfloat16", 16)
    assert lora(**LORA, max_cpu_loras=0).max_cpu_loras == 1
    assert lora(**LORA, max_cpu_loras=5, lora_dtype="float32").lora_dtype == "float32"
    assert lora(**LORA, long_lora_scaling_factors=(4.0,)).long_lora_scaling_factors == (4.0,)
    for rank in (8, 16, 32, 64):
        assert lora(**LORA, max_lora_rank=rank).max_lora_rank == rank
    assert "checked" not in caplog.text


def test_lora_over_quantised_weights_warns(resolve: Resolve, caplog: pytest.LogCaptureFixture) -> None:
    quantized = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
    with caplog.at_level(logging.WARNING, "aserve"), pytest.raises(UnsupportedError):
        resolve(config=quantized, **LORA)
    assert "LoRA over fp8 weights" in caplog.text


# --- speculation


def speculative(resolve: Resolve, **arguments: Any) -> Any:
    config = resolve()
    args = EngineArgs(config.model.model, **arguments)
    return resolve_speculative_config(args, config.model, config.parallel, CPU)


def test_ngram_speculation(resolve: Resolve) -> None:
    assert speculative(resolve) is None
    found = speculative(resolve, **NGRAM, ngram_prompt_lookup_max=4, speculative_disable_by_batch_size=2)
    assert (found.ngram_prompt_lookup_max, found.ngram_prompt_lookup_min) == (4, 1)
    assert (found.num_speculative_tokens, found.disable_by_batch_size, found.draft_model) == (3, 2, None)


def test_order_of_the_speculative_checks(resolve: Resolve) -> None:
    wrong: dict[str, Any] = {
        "speculative_model": "[ngram]",
        "num_speculative_tokens": 0,
        "speculative_disable_by_batch_size": 1,
        "enable_chunked_prefill": True,
        "ngram_prompt_lookup_min": 0,
    }
    repairs: list[tuple[str, dict[str, Any]]] = [
        ("speculative_disable_by_batch_size must be at least 2", {"speculative_disable_by_batch_size": 2}),
        ("does not go with enable_chunked_prefill", {"enable_chunked_prefill": False}),
        ("needs use_v2_block_manager", {"use_v2_block_manager": True}),
        ("needs ngram_prompt_lookup_max", {"ngram_prompt_lookup_max": 2}),
        ("ngram_prompt_lookup_min must be from 1", {"ngram_prompt_lookup_min": 2}),
        ("num_speculative_tokens must be at least 1", {"num_speculative_tokens": 1}),
    ]
    for message, repair in repairs:
        with pytest.raises(ConfigError, match=message):
            speculative(resolve, **wrong)
        wrong.update(repair)
    assert speculative(resolve, **wrong).ngram_prompt_lookup_min == 2


def test_draft_model(resolve: Resolve, make_model: MakeModel) -> None:
    common = {"num_speculative_tokens": 2, "use_v2_block_manager": True}
    draft = make_model(max_position_embeddings=1024, num_hidden_layers=1, torch_dtype="float32")
    found = speculative(resolve, speculative_model=draft, **common)
    assert (found.draft_model.max_model_len, found.draft_model.dtype) == (1024, "bfloat16")
    assert found.draft_model.num_layers == 1
    shorter = speculative(resolve, speculative_model=draft, speculative_max_model_len=1000, **common)
    assert shorter.draft_model.max_model_len == 1000
    with pytest.raises(ConfigError, match="speculative_max_model_len must be from 1 to 1024"):
        speculative(resolve, speculative_model=draft, speculative_max_model_len=1025, **common)
    with pytest.raises(ConfigError, match="vocabulary"):
        speculative(resolve, speculative_model=make_model(vocab_size=300), **common)


def test_multiprocessing_does_not_go_with_speculation(resolve: Resolve) -> None:
    with pytest.raises(ConfigError, match="does not go with distributed_executor_backend 'mp'"):
        resolve(**NGRAM, ngram_prompt_lookup_max=2, distributed_executor_backend="mp")


# --- vision, tokenizer pool, loader


def test_image_inputs(resolve: Resolve) -> None:
    model = resolve().model
    found = resolve_vision_config(EngineArgs("m", **IMAGE), model)
    assert found is not None
    assert found.image_input_type is VisionLanguageConfig.ImageInputType.PIXEL_VALUES
    assert (found.image_input_shape, found.image_token_id, found.image_feature_size) == ((1, 3, 4, 4), 5, 7)
    with pytest.raises(ConfigError, match="needs image_token_id and image_feature_size as well"):
        resolve_vision_config(EngineArgs("m", image_input_type="pixel_values", image_input_shape="1"), model)


def test_vision_model_without_image_arguments(resolve: Resolve) -> None:
    model = resolve().model
    model.hf_config.vision_config = {"image_size": 336}
    with pytest.raises(ConfigError, match="takes images: give image_input_type"):
        resolve_vision_config(EngineArgs("m"), model)


def test_tokenizer_pool() -> None:
    ignored: dict[str, Any] = {"tokenizer_pool_type": "nonsense", "tokenizer_pool_extra_config": "nonsense"}
    assert resolve_tokenizer_pool_config(EngineArgs("m", **ignored)) is None
    for extra in ('{"a": 1}', {"a": 1}):
        found = resolve_tokenizer_pool_config(EngineArgs("m", **POOL, tokenizer_pool_extra_config=extra))
        assert found is not None
        assert (found.pool_size, found.pool_type, found.extra_config) == (2, "ray", {"a": 1})


def test_load_format_is_case_insensitive(resolve: Resolve) -> None:
    assert resolve(load_format="Dummy").load.load_format == "dummy"
    assert resolve(model_loader_extra_config="{}").load.extra_config == {}


def test_arguments_beside_their_switch_are_mentioned(
    resolve: Resolve, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "aserve"):
        resolve(max_loras=2, ngram_prompt_lookup_max=3, image_token_id=4)
    assert "max_loras without enable_lora: no effect" in caplog.text
    assert "ngram_prompt_lookup_max without speculative_model: no effect" in caplog.text
    assert "image_token_id without image_input_type: no effect" in caplog.text
    caplog.clear()
    resolve()
    assert "no effect" not in caplog.text


def test_numpy_numbers_count_as_numbers(resolve: Resolve) -> None:
    numpy = pytest.importorskip("numpy")
    assert resolve(max_num_seqs=numpy.int64(4), gpu_memory_utilization=1).scheduler.max_num_seqs == 4


def test_scheduler_checks_do_not_need_the_engine(resolve: Resolve) -> None:
    model = resolve().model
    with pytest.raises(ConfigError, match="set enable_chunked_prefill"):
        resolve_scheduler_config(EngineArgs("m", max_num_batched_tokens=300), model)
