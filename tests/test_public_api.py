"""The names people import, and the signatures they rely on, as literals."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import aserve

REQUIRED = inspect.Parameter.empty

LLM_INIT: dict[str, Any] = {
    "model": REQUIRED,
    "tokenizer": None,
    "tokenizer_mode": "auto",
    "skip_tokenizer_init": False,
    "trust_remote_code": False,
    "tensor_parallel_size": 1,
    "dtype": "auto",
    "quantization": None,
    "revision": None,
    "tokenizer_revision": None,
    "seed": 0,
    "gpu_memory_utilization": 0.9,
    "swap_space": 4,
    "enforce_eager": False,
    "max_context_len_to_capture": None,
    "max_seq_len_to_capture": 8192,
    "disable_custom_all_reduce": False,
}
LLM_GENERATE: dict[str, Any] = {
    "prompts": None,
    "sampling_params": None,
    "prompt_token_ids": None,
    "use_tqdm": True,
    "lora_request": None,
    "multi_modal_data": None,
}
LLM_ENGINE_INIT = [
    "model_config",
    "cache_config",
    "parallel_config",
    "scheduler_config",
    "device_config",
    "load_config",
    "lora_config",
    "vision_language_config",
    "speculative_config",
    "decoding_config",
    "executor_class",
    "log_stats",
    "usage_context",
]
ASYNC_INIT: dict[str, Any] = {
    "worker_use_ray": REQUIRED,
    "engine_use_ray": REQUIRED,
    "log_requests": True,
    "max_log_len": None,
    "start_engine_loop": True,
}
METHODS = {
    "LLM": ["generate", "encode", "get_tokenizer", "set_tokenizer", "llm_engine"],
    "LLMEngine": [
        "from_engine_args",
        "add_request",
        "abort_request",
        "step",
        "has_unfinished_requests",
        "get_num_unfinished_requests",
        "get_tokenizer",
        "get_model_config",
        "get_decoding_config",
        "check_health",
        "do_log_stats",
    ],
    "AsyncLLMEngine": [
        "from_engine_args",
        "generate",
        "encode",
        "abort",
        "check_health",
        "get_tokenizer",
        "get_model_config",
        "get_decoding_config",
        "do_log_stats",
        "start_background_loop",
        "is_running",
        "is_stopped",
        "errored",
    ],
}


def named(function: Any) -> dict[str, Any]:
    """Named parameters and their defaults, in order, without ``self``."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in kinds and p.name != "self"}


def test_public_names_are_sorted_and_resolve() -> None:
    assert aserve.__all__ == sorted(aserve.__all__)
    for name in aserve.__all__:
        assert getattr(aserve, name) is not None
    assert dir(aserve) == aserve.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = aserve.NoSuchThing


def test_llm_init() -> None:
    parameters = inspect.signature(aserve.LLM.__init__).parameters
    assert list(named(aserve.LLM.__init__).items()) == list(LLM_INIT.items())
    assert list(parameters.values())[-1].kind is inspect.Parameter.VAR_KEYWORD


def test_llm_generate() -> None:
    assert list(named(aserve.LLM.generate).items()) == list(LLM_GENERATE.items())


def test_llm_engine_init() -> None:
    parameters = named(aserve.LLMEngine.__init__)
    assert list(parameters) == LLM_ENGINE_INIT
    assert {name for name, default in parameters.items() if default is not REQUIRED} == {"usage_context"}


def test_async_engine_init() -> None:
    parameters = inspect.signature(aserve.AsyncLLMEngine.__init__).parameters
    assert named(aserve.AsyncLLMEngine.__init__) == ASYNC_INIT
    assert [p.name for p in parameters.values()][1:3] == ["worker_use_ray", "engine_use_ray"]
    kinds = {parameter.kind for parameter in parameters.values()}
    assert inspect.Parameter.VAR_POSITIONAL in kinds and inspect.Parameter.VAR_KEYWORD in kinds


def test_engine_classes_are_made_from_arguments() -> None:
    assert list(named(aserve.LLMEngine.from_engine_args)) == ["engine_args", "usage_context"]
    assert list(named(aserve.AsyncLLMEngine.from_engine_args))[:3] == [
        "engine_args",
        "start_engine_loop",
        "usage_context",
    ]


@pytest.mark.parametrize(("name", "methods"), METHODS.items())
def test_classes_have_their_methods(name: str, methods: list[str]) -> None:
    cls = getattr(aserve, name)
    assert [method for method in methods if not hasattr(cls, method)] == []
