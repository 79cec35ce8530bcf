"""From text to values: round trips, empty values, the environment, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import aserve.args
from aserve import packaged
from aserve.args import (
    SERVE_DEFAULTS,
    AsyncEngineArgs,
    EngineArgs,
    LoRAModule,
    ServerArgs,
    default_model,
    parse_serve_args,
    serve_args_from_environment,
)
from aserve.config.cli import add_flags, arg, declared
from aserve.errors import ConfigError, UnsupportedError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASERVE_API_KEY", "VLLM_API_KEY", "ASERVE_ARGS"):
        monkeypatch.delenv(name, raising=False)


ENGINE_FLAGS: list[tuple[str, list[str], Any]] = [
    ("model", ["m"], "m"),
    ("served_model_name", ["a", "b"], ["a", "b"]),
    ("tokenizer", ["t"], "t"),
    ("skip_tokenizer_init", [], True),
    ("tokenizer_mode", ["slow"], "slow"),
    ("trust_remote_code", [], True),
    ("download_dir", ["/d"], "/d"),
    ("load_format", ["dummy"], "dummy"),
    ("dtype", ["half"], "half"),
    ("kv_cache_dtype", ["fp8"], "fp8"),
    ("quantization_param_path", ["q.json"], "q.json"),
    ("seed", ["7"], 7),
    ("max_model_len", ["99"], 99),
    ("worker_use_ray", [], True),
    ("distributed_executor_backend", ["mp"], "mp"),
    ("pipeline_parallel_size", ["2"], 2),
    ("tensor_parallel_size", ["3"], 3),
    ("max_parallel_loading_workers", ["4"], 4),
    ("block_size", ["32"], 32),
    ("enable_prefix_caching", [], True),
    ("use_v2_block_manager", [], True),
    ("swap_space", ["0"], 0),
    ("preemption_mode", ["swap"], "swap"),
    ("gpu_memory_utilization", ["0.5"], 0.5),
    ("max_num_batched_tokens", ["100"], 100),
    ("max_num_seqs", ["5"], 5),
    ("max_logprobs", ["9"], 9),
    ("disable_log_stats", [], True),
    ("revision", ["r"], "r"),
    ("code_revision", ["c"], "c"),
    ("rope_scaling", ['{"type": "dynamic", "factor": 2.0}'], {"type": "dynamic", "factor": 2.0}),
    ("tokenizer_revision", ["tr"], "tr"),
    ("quantization", ["awq"], "awq"),
    ("enforce_eager", [], True),
    ("max_context_len_to_capture", ["1"], 1),
    ("max_seq_len_to_capture", ["64"], 64),
    ("disable_custom_all_reduce", [], True),
    ("tokenizer_pool_size", ["2"], 2),
    ("tokenizer_pool_type", ["x"], "x"),
    ("tokenizer_pool_extra_config", ['{"a": 1}'], '{"a": 1}'),
    ("enable_lora", [], True),
    ("max_loras", ["2"], 2),
    ("max_lora_rank", ["8"], 8),
    ("fully_sharded_loras", [], True),
    ("lora_extra_vocab_size", ["0"], 0),
    ("long_lora_scaling_factors", ["4.0,8"], (4.0, 8.0)),
    ("lora_dtype", ["float32"], "float32"),
    ("max_cpu_loras", ["3"], 3),
    ("device", ["cpu"], "cpu"),
    ("ray_workers_use_nsight", [], True),
    ("num_gpu_blocks_override", ["12"], 12),
    ("num_lookahead_slots", ["1"], 1),
    ("model_loader_extra_config", ['{"b": 2}'], '{"b": 2}'),
    ("image_input_type", ["pixel_values"], "pixel_values"),
    ("image_token_id", ["32000"], 32000),
    ("image_input_shape", ["1,3,4,4"], "1,3,4,4"),
    ("image_feature_size", ["576"], 576),
    ("scheduler_delay_factor", ["0.25"], 0.25),
    ("enable_chunked_prefill", [], True),
    ("guided_decoding_backend", ["lm-format-enforcer"], "lm-format-enforcer"),
    ("speculative_model", ["[ngram]"], "[ngram]"),
    ("num_speculative_tokens", ["3"], 3),
    ("speculative_max_model_len", ["50"], 50),
    ("speculative_disable_by_batch_size", ["6"], 6),
    ("ngram_prompt_lookup_max", ["4"], 4),
    ("ngram_prompt_lookup_min", ["2"], 2),
    ("max_waiting_requests", ["9"], 9),
    ("max_waiting_tokens", ["99"], 99),
    ("num_scheduler_steps", ["4"], 4),
    ("max_decode_slowdown", ["3.5"], 3.5),
    ("overlap", ["0"], 0),
    ("guided_compile_timeout", ["1.5"], 1.5),
    ("guided_cache_size", ["64"], 64),
    ("engine_use_ray", [], True),
    ("disable_log_requests", [], True),
    ("max_log_len", ["20"], 20),
]
SERVER_FLAGS: list[tuple[str, list[str], Any]] = [
    ("host", ["0.0.0.0"], "0.0.0.0"),
    ("port", ["0"], 0),
    ("log_level", ["trace"], "trace"),
    ("allow_credentials", [], True),
    ("allowed_origins", ['["http://a"]'], ["http://a"]),
    ("allowed_methods", ['["GET", "POST"]'], ["GET", "POST"]),
    ("allowed_headers", ["[]"], []),
    ("api_key", ["k1", "k2"], ["k1", "k2"]),
    ("chat_template", ["{{ x }}"], "{{ x }}"),
    ("response_role", ["bot"], "bot"),
    ("tool_call_parser", ["llama3_json"], "llama3-json"),
    ("enable_auto_tool_choice", [], True),
    ("root_path", ["/llm/"], "/llm"),
    ("middleware", ["a.b"], ["a.b"]),
    ("strict_fields", [], True),
    ("drain_timeout", ["1.5"], 1.5),
    ("max_body_size", ["1000"], 1000),
    ("stall_timeout", ["9.5"], 9.5),
    ("api_key_file", ["keys"], "keys"),
    ("otlp_traces_endpoint", ["http://a:4318/v1/traces"], "http://a:4318/v1/traces"),
]
TLS_FLAGS = {"ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs"}


def as_flag(name: str, values: list[str]) -> list[str]:
    return ["--" + name.replace("_", "-"), *values]


def test_the_tables_leave_no_argument_out() -> None:
    assert [name for name, _, _ in ENGINE_FLAGS] == [item.name for item in declared(AsyncEngineArgs)]
    assert {name for name, _, _ in SERVER_FLAGS} | TLS_FLAGS | {"lora_modules"} == {
        item.name for item in declared(ServerArgs)
    }


@pytest.mark.parametrize(("name", "values", "expected"), ENGINE_FLAGS)
def test_engine_flag_sets_its_field_alone(name: str, values: list[str], expected: Any) -> None:
    head = [] if name == "model" else ["--model", "m"]
    engine, server = parse_serve_args(head + as_flag(name, values))
    plain = dataclasses.asdict(AsyncEngineArgs("m", **SERVE_DEFAULTS))
    assert plain[name] != expected or name == "model", "the value under test must not be the default"
    assert dataclasses.asdict(engine) == {**plain, name: expected}
    assert server == ServerArgs()


@pytest.mark.parametrize(("name", "values", "expected"), SERVER_FLAGS)
def test_server_flag_sets_its_field_alone(name: str, values: list[str], expected: Any) -> None:
    engine, server = parse_serve_args(["m", *as_flag(name, values)])
    assert dataclasses.asdict(server) == {**dataclasses.asdict(ServerArgs()), name: expected}
    assert engine == AsyncEngineArgs("m", **SERVE_DEFAULTS)


@pytest.mark.parametrize("name", ["enable_prefix_caching", "enable_chunked_prefill"])
def test_what_serving_switches_on_can_be_switched_off(name: str) -> None:
    assert getattr(parse_serve_args(["m"])[0], name) is None
    assert getattr(parse_serve_args(["m", "--no-" + name.replace("_", "-")])[0], name) is False


def test_tls_flags(tmp_path: Any) -> None:
    path = tmp_path / "file.pem"
    path.write_text("x")
    argv = ["m", "--ssl-cert-reqs", "2"]
    for name in ("keyfile", "certfile", "ca-certs"):
        argv += [f"--ssl-{name}", str(path)]
    _, server = parse_serve_args(argv)
    assert (server.ssl_keyfile, server.ssl_certfile, server.ssl_ca_certs) == (str(path),) * 3
    assert server.ssl_cert_reqs == 2


@pytest.mark.parametrize(
    ("short", "name", "value"),
    [
        ("-tp", "tensor_parallel_size", 2),
        ("-pp", "pipeline_parallel_size", 2),
        ("-q", "quantization", "gptq"),
    ],
)
def test_short_flags(short: str, name: str, value: Any) -> None:
    engine, _ = parse_serve_args(["m", short, str(value)])
    assert getattr(engine, name) == value


def test_uvicorn_log_level_is_an_alias() -> None:
    assert parse_serve_args(["m", "--uvicorn-log-level", "debug"])[1].log_level == "debug"


def test_repeated_flags_add_up() -> None:
    argv = ["m", "--middleware", "a.b", "--middleware", "c.d", "--api-key", "x", "--api-key", "y", "z"]
    _, server = parse_serve_args(argv)
    assert (server.middleware, server.api_key) == (["a.b", "c.d"], ["x", "y", "z"])
    assert parse_serve_args(["m"])[1].middleware == []


@pytest.mark.parametrize("empty", ["", "None"])
@pytest.mark.parametrize(
    "name", ["tokenizer", "revision", "quantization", "speculative_model", "rope_scaling", "image_input_type",
             "long_lora_scaling_factors", "model_loader_extra_config"],
)  # fmt: skip
def test_empty_values_mean_no_value(name: str, empty: str) -> None:
    engine, _ = parse_serve_args(["m", *as_flag(name, [empty])])
    assert getattr(engine, name) == (engine.model if name == "tokenizer" else None)


def test_empty_server_values_mean_no_value() -> None:
    argv = ["m", "--host", "None", "--api-key", "", "--response-role", "None", "--middleware", ""]
    assert parse_serve_args(argv)[1] == ServerArgs(host=None)


@pytest.mark.parametrize(
    "argv",
    [
        ["--dtype", "float8"],
        ["--block-size", "4"],
        ["--seed", "x"],
        ["--rope-scaling", "[1]"],
        ["--rope-scaling", "{"],
        ["--allowed-origins", "*"],
        ["--allowed-origins", '{"a": 1}'],
        ["--long-lora-scaling-factors", "4,x"],
        ["--lora-modules", "nameonly"],
        ["--lora-modules", "a=b=c"],
        ["--lora-modules", "=path"],
        ["--quantisation", "awq"],
        ["--max-model", "5"],
        ["--model", "other"],
    ],
)
def test_malformed_command_lines_end_with_status_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_serve_args(["m", *argv])
    assert ended.value.code == 2
    assert "aserve serve: error:" in capsys.readouterr().err


def test_help_renders(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_serve_args(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--max-model-len" in text and "smollm2" in text


def test_model_positional_or_flag() -> None:
    for argv in (["m"], ["--model", "m"], ["m", "--model", "m"]):
        assert parse_serve_args(argv)[0].model == "m"


def missing(name: str) -> str:
    raise ConfigError("not installed")


@pytest.mark.parametrize(
    ("find", "expected"), [(lambda name: "/p/s.gguf", "smollm2"), (missing, "facebook/opt-125m")]
)
def test_model_when_none_is_named(
    find: Callable[[str], str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "resolve", find)
    assert default_model() == expected
    engine, _ = parse_serve_args([])
    assert (engine.model, engine.tokenizer) == (expected, expected)


def test_from_cli_args_takes_fields_by_name() -> None:
    namespace = argparse.Namespace(model="m", seed=3, unrelated=1)
    assert EngineArgs.from_cli_args(namespace) == EngineArgs("m", seed=3)
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    assert EngineArgs.from_cli_args(parser.parse_args(["--model", "m"])) == EngineArgs("m")


def test_arguments_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASERVE_ARGS", """m --served-model-name "my model" --port 81""")
    engine, server = serve_args_from_environment()
    assert (engine.model, engine.served_model_name, server.port) == ("m", ["my model"], 81)
    monkeypatch.setenv("ASERVE_ARGS", "m --chat-template '{{")
    with pytest.raises(ConfigError, match="ASERVE_ARGS"):
        serve_args_from_environment()
    monkeypatch.delenv("ASERVE_ARGS")
    assert serve_args_from_environment()[1] == ServerArgs()


def test_api_key_from_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "older")
    assert parse_serve_args(["m", "--api-key", "flag"])[1].api_key == ["older"]
    monkeypatch.setenv("ASERVE_API_KEY", "env")
    assert parse_serve_args(["m", "--api-key", "flag"])[1].api_key == ["env"]
    assert parse_serve_args(["m"])[1].api_key == ["env"]


@pytest.mark.parametrize(
    ("argv", "param"),
    [
        (["--port", "65536"], "port"),
        (["--port", "-1"], "port"),
        (["--drain-timeout", "-1"], "drain_timeout"),
        (["--drain-timeout", "nan"], "drain_timeout"),
        (["--max-body-size", "0"], "max_body_size"),
        (["--root-path", "llm"], "root_path"),
        (["--middleware", "nodots"], "middleware"),
        (["--ssl-certfile", "/no/such"], "ssl_certfile"),
        (["--ssl-keyfile", __file__], "ssl_keyfile"),
        (["--ssl-ca-certs", __file__], "ssl_ca_certs"),
        (["--ssl-cert-reqs", "1"], "ssl_cert_reqs"),
        (["--ssl-certfile", __file__, "--ssl-cert-reqs", "3"], "ssl_cert_reqs"),
        (["--ssl-certfile", __file__, "--ssl-cert-reqs", "2"], "ssl_cert_reqs"),
    ],
)
def test_server_settings_that_cannot_work(argv: list[str], param: str) -> None:
    with pytest.raises(ConfigError, match=param) as caught:
        parse_serve_args(["m", *argv])
    assert caught.value.param == param


def test_server_values_given_from_python_are_checked() -> None:
    for bad in (ServerArgs(log_level="loud"), ServerArgs(port="80")):  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            bad.check()


def test_lora_modules_parse_and_are_refused() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, ServerArgs)
    parsed = parser.parse_args(["--lora-modules", "a=/x", "b=/y"])
    assert parsed.lora_modules == [LoRAModule("a", "/x"), LoRAModule("b", "/y")]
    with pytest.raises(UnsupportedError, match="lora_modules is not built"):
        parse_serve_args(["m", "--lora-modules", "a=/x"])


def test_a_field_without_a_derivable_flag_must_name_its_converter() -> None:
    listed = arg(["a"], group="g", help="A list.")
    odd = dataclasses.make_dataclass("Odd", [("value", list[str], listed)])
    with pytest.raises(TypeError, match="value: no flag can be derived"):
        add_flags(argparse.ArgumentParser(), odd)


def test_importing_the_arguments_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, aserve.args, aserve.config.table; aserve.args.parse_serve_args(['smollm2']);"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert aserve.args.__all__ == sorted(aserve.args.__all__)
