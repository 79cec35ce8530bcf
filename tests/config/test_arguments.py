"""Names, order, types and defaults of every argument, against a table written by hand."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

import pytest

from aserve.args import AsyncEngineArgs, EngineArgs, ServerArgs
from aserve.config.cli import add_flags

STR, INT, MAYBE_STR, MAYBE_INT = str, int, str | None, int | None
REQUIRED = dataclasses.MISSING

ENGINE: list[tuple[str, Any, Any]] = [
    ("model", STR, REQUIRED),
    ("served_model_name", list[str] | None, None),
    ("tokenizer", MAYBE_STR, None),
    ("skip_tokenizer_init", bool, False),
    ("tokenizer_mode", STR, "auto"),
    ("trust_remote_code", bool, False),
    ("download_dir", MAYBE_STR, None),
    ("load_format", STR, "auto"),
    ("dtype", STR, "auto"),
    ("kv_cache_dtype", STR, "auto"),
    ("quantization_param_path", MAYBE_STR, None),
    ("seed", INT, 0),
    ("max_model_len", MAYBE_INT, None),
    ("worker_use_ray", bool, False),
    ("distributed_executor_backend", MAYBE_STR, None),
    ("pipeline_parallel_size", INT, 1),
    ("tensor_parallel_size", INT, 1),
    ("max_parallel_loading_workers", MAYBE_INT, None),
    ("block_size", INT, 16),
    ("enable_prefix_caching", bool | None, False),
    ("use_v2_block_manager", bool, False),
    ("swap_space", INT, 4),
    ("preemption_mode", MAYBE_STR, None),
    ("gpu_memory_utilization", float, 0.90),
    ("max_num_batched_tokens", MAYBE_INT, None),
    ("max_num_seqs", INT, 256),
    ("max_logprobs", INT, 5),
    ("disable_log_stats", bool, False),
    ("revision", MAYBE_STR, None),
    ("code_revision", MAYBE_STR, None),
    ("rope_scaling", dict[str, Any] | None, None),
    ("tokenizer_revision", MAYBE_STR, None),
    ("quantization", MAYBE_STR, None),
    ("enforce_eager", bool, False),
    ("max_context_len_to_capture", MAYBE_INT, None),
    ("max_seq_len_to_capture", INT, 8192),
    ("disable_custom_all_reduce", bool, False),
    ("tokenizer_pool_size", INT, 0),
    ("tokenizer_pool_type", STR, "ray"),
    ("tokenizer_pool_extra_config", dict[str, Any] | str | None, None),
    ("enable_lora", bool, False),
    ("max_loras", INT, 1),
    ("max_lora_rank", INT, 16),
    ("fully_sharded_loras", bool, False),
    ("lora_extra_vocab_size", INT, 256),
    ("long_lora_scaling_factors", tuple[float, ...] | None, None),
    ("lora_dtype", STR, "auto"),
    ("max_cpu_loras", MAYBE_INT, None),
    ("device", STR, "auto"),
    ("ray_workers_use_nsight", bool, False),
    ("num_gpu_blocks_override", MAYBE_INT, None),
    ("num_lookahead_slots", INT, 0),
    ("model_loader_extra_config", dict[str, Any] | str | None, None),
    ("image_input_type", MAYBE_STR, None),
    ("image_token_id", MAYBE_INT, None),
    ("image_input_shape", MAYBE_STR, None),
    ("image_feature_size", MAYBE_INT, None),
    ("scheduler_delay_factor", float, 0.0),
    ("enable_chunked_prefill", bool | None, False),
    ("guided_decoding_backend", STR, "llguidance"),
    ("speculative_model", MAYBE_STR, None),
    ("num_speculative_tokens", MAYBE_INT, None),
    ("speculative_max_model_len", MAYBE_INT, None),
    ("speculative_disable_by_batch_size", MAYBE_INT, None),
    ("ngram_prompt_lookup_max", MAYBE_INT, None),
    ("ngram_prompt_lookup_min", MAYBE_INT, None),
    ("max_waiting_requests", MAYBE_INT, None),
    ("max_waiting_tokens", MAYBE_INT, None),
    ("num_scheduler_steps", MAYBE_INT, None),
    ("max_decode_slowdown", float | None, None),
    ("overlap", INT, 1),
    ("guided_compile_timeout", float | None, None),
    ("guided_cache_size", INT, 256),
]
ASYNC: list[tuple[str, Any, Any]] = [
    ("engine_use_ray", bool, False),
    ("disable_log_requests", bool, False),
    ("max_log_len", MAYBE_INT, None),
]
SERVER: dict[str, Any] = {
    "host": "127.0.0.1",
    "api_key_file": None,
    "stall_timeout": 120.0,
    "port": 8000,
    "log_level": "info",
    "allow_credentials": False,
    "allowed_origins": ["*"],
    "allowed_methods": ["*"],
    "allowed_headers": ["*"],
    "api_key": None,
    "lora_modules": None,
    "chat_template": None,
    "response_role": "assistant",
    "tool_call_parser": None,
    "enable_auto_tool_choice": False,
    "ssl_keyfile": None,
    "ssl_certfile": None,
    "ssl_ca_certs": None,
    "ssl_cert_reqs": 0,
    "root_path": None,
    "middleware": [],
    "strict_fields": False,
    "drain_timeout": 30.0,
    "max_body_size": 16 * 1024 * 1024,
    "otlp_traces_endpoint": None,
}
CHOICES: dict[str, list[Any]] = {
    "--tool-call-parser": ["hermes", "llama3-json", "mistral", "pythonic"],
    "--log-level": ["debug", "info", "warning", "error", "critical", "trace"],
    "--tokenizer-mode": ["auto", "slow"],
    "--load-format": ["auto", "pt", "safetensors", "npcache", "dummy", "tensorizer", "gguf"],
    "--dtype": ["auto", "half", "float16", "bfloat16", "float", "float32"],
    "--guided-decoding-backend": ["llguidance", "outlines", "lm-format-enforcer"],
    "--distributed-executor-backend": ["ray", "mp"],
    "--device": ["auto", "cuda", "neuron", "cpu"],
    "--kv-cache-dtype": ["auto", "fp8", "fp8_e5m2", "fp8_e4m3"],
    "--quantization": ["aqlm", "awq", "deepspeedfp", "fp8", "gguf", "gptq", "gptq_marlin", "gptq_marlin_24",
                       "marlin", "sparseml", "squeezellm", None],
    "--lora-dtype": ["auto", "float16", "bfloat16", "float32"],
    "--block-size": [8, 16, 32],
    "--image-input-type": ["pixel_values", "image_features", None],
    "--preemption-mode": ["recompute", "swap", None],
    "--overlap": [0, 1],
}  # fmt: skip
OTHER_SPELLINGS = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-q": "--quantization",
    "--uvicorn-log-level": "--log-level",
    "--no-enable-prefix-caching": "--enable-prefix-caching",
    "--no-enable-chunked-prefill": "--enable-chunked-prefill",
}


def listing(cls: type) -> list[tuple[str, Any, Any]]:
    hints = typing.get_type_hints(cls)
    return [(field.name, hints[field.name], field.default) for field in dataclasses.fields(cls)]


def test_engine_arguments_in_order() -> None:
    assert listing(EngineArgs) == ENGINE


def test_async_arguments_follow_the_engine_ones() -> None:
    assert listing(AsyncEngineArgs) == ENGINE + ASYNC
    assert issubclass(AsyncEngineArgs, EngineArgs)


def test_server_arguments_and_defaults() -> None:
    assert dataclasses.asdict(ServerArgs()) == SERVER


def test_default_lists_are_not_shared() -> None:
    ServerArgs().middleware.append("a.b")
    assert ServerArgs().middleware == []


def test_model_is_the_one_required_argument() -> None:
    with pytest.raises(TypeError, match="model"):
        EngineArgs()
    assert EngineArgs("some/model").model == "some/model"


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="gpu_memory_utilisation"):
        EngineArgs("m", gpu_memory_utilisation=0.5)  # type: ignore[call-arg]


def test_tokenizer_is_the_models_unless_given() -> None:
    assert EngineArgs("m").tokenizer == "m"
    assert EngineArgs("m", tokenizer="t").tokenizer == "t"


def parser_actions() -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser, ServerArgs)
    AsyncEngineArgs.add_cli_args(parser)
    return {flag: action for action in parser._actions for flag in action.option_strings}


def test_every_argument_has_its_flag_and_no_other() -> None:
    names = [name for name, _, _ in ENGINE + ASYNC] + list(SERVER)
    expected = {"--" + name.replace("_", "-") for name in names} | set(OTHER_SPELLINGS)
    actions = parser_actions()
    assert set(actions) == expected
    for other, flag in OTHER_SPELLINGS.items():
        assert actions[other] is actions[flag]


def test_choices() -> None:
    found = {action.option_strings[0]: list(action.choices) for action in parser_actions().values()
             if action.choices is not None}  # fmt: skip
    assert found == CHOICES


def test_every_argument_has_help() -> None:
    for flag, action in parser_actions().items():
        assert action.help and action.help.split("(default")[0].strip().endswith("."), flag
