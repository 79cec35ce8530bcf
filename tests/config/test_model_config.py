"""What is read out of a model's own config: lengths, rope, data types, shapes, names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from aserve import packaged, registry
from aserve.args import EngineArgs
from aserve.config.device import DeviceConfig
from aserve.config.dtype import resolve_dtype
from aserve.config.lengths import ROPE_TYPES
from aserve.errors import ConfigError
from tests.config.conftest import MakeModel, Resolve

CPU = DeviceConfig("cpu")
HOPPER = DeviceConfig("cuda", (9, 0))
TURING = DeviceConfig("cuda", (7, 5))
GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "head_dim": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "sliding_window": 32,
    "max_position_embeddings": 1024,
    "vocab_size": 256,
    "dtype": "bfloat16",
}
OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "vocab_size": 256,
    "torch_dtype": "float16",
}
SU = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


# --- context length


@pytest.mark.parametrize(
    ("config", "override", "expected"),
    [
        ({}, None, 2048),
        ({"max_position_embeddings": 8192}, {"type": "dynamic", "factor": 2.0}, 16384),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, None, 16384),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, {"type": "dynamic", "factor": 2.0}, 4096),
        ({}, {"rope_type": "linear", "factor": 2}, 4096),
        ({}, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({}, {"type": "su", **SU}, 2048),
        ({}, {"rope_type": "longrope", **SU}, 2048),
        ({}, LLAMA3, 2048),
        ({"rope_scaling": LLAMA3}, None, 2048),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, None, 4096),
        ({"n_positions": 1000, "seq_length": 900}, None, 900),
        ({"max_seq_len": 100}, None, 100),
        ({"model_max_length": 100, "max_sequence_length": 101}, None, 100),
        ({"max_seq_length": 70}, None, 70),
        ({"seq_len": 60}, None, 60),
    ],
)
def test_derived_length(
    config: dict[str, Any], override: dict[str, Any] | None, expected: int, resolve: Resolve
) -> None:
    assert resolve(config=config, rope_scaling=override).model.max_model_len == expected


def test_requested_length(resolve: Resolve) -> None:
    assert resolve(max_model_len=2048).model.max_model_len == 2048
    assert (
        resolve(max_model_len=4096, rope_scaling={"type": "linear", "factor": 2.0}).model.max_model_len
        == 4096
    )
    with pytest.raises(ConfigError, match=r"2049.* more than the 2048 tokens.*max_position_embeddings"):
        resolve(max_model_len=2049)
    with pytest.raises(ConfigError, match=r"rope factor 2\.0"):
        resolve(max_model_len=4097, rope_scaling={"type": "linear", "factor": 2.0})


def test_requested_length_up_to_model_max_length(resolve: Resolve) -> None:
    longer = {"model_max_length": 4096}
    assert resolve(config=longer).model.max_model_len == 2048
    assert resolve(config=longer, max_model_len=4096).model.max_model_len == 4096
    with pytest.raises(ConfigError, match="max_model_len"):
        resolve(config=longer, max_model_len=4097)


def test_config_without_any_length(resolve: Resolve, caplog: pytest.LogCaptureFixture) -> None:
    silent = {"model_type": "bloom", "max_position_embeddings": ...}
    with caplog.at_level(logging.WARNING, "aserve"):
        assert resolve(config=silent).model.max_model_len == 2048
    assert "assuming 2048 tokens" in caplog.text
    caplog.clear()
    assert resolve(config=silent, max_model_len=9000).model.max_model_len == 9000
    assert "assuming" not in caplog.text


# --- rope scaling


def test_override_replaces_scaling_and_keeps_the_base(resolve: Resolve) -> None:
    own = {"rope_theta": 500000.0, "rope_scaling": LLAMA3}
    override = {"type": "dynamic", "factor": 2.0}
    model = resolve(config=own, rope_scaling=override).model
    assert model.hf_config.rope_parameters == {"rope_theta": 500000.0, "rope_type": "dynamic", "factor": 2.0}
    assert model.rope_scaling == override == {"type": "dynamic", "factor": 2.0}


def test_override_on_parameters_per_layer_type(resolve: Resolve, make_model: MakeModel) -> None:
    model = resolve(model=make_model(GEMMA), rope_scaling={"type": "linear", "factor": 2.0}).model
    rope = model.hf_config.rope_parameters
    assert rope["full_attention"] == {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}
    assert rope["sliding_attention"]["rope_type"] == "default"
    assert model.max_model_len == 1024


def test_override_on_a_model_without_rope(resolve: Resolve, make_model: MakeModel) -> None:
    with pytest.raises(ConfigError, match="no rotary embeddings"):
        resolve(model=make_model(OPT), rope_scaling={"type": "linear", "factor": 2.0})


def test_every_rope_type_needs_its_keys(resolve: Resolve) -> None:
    whole: dict[str, Any] = {**SU, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for kind, keys in ROPE_TYPES.items():
        for missing in keys:
            rope = {"type": kind, **{key: whole[key] for key in keys if key != missing}}
            with pytest.raises(ConfigError, match=f"type '{kind}' needs '{missing}'"):
                resolve(rope_scaling=rope)


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "cubic", "factor": 2.0},
        {"type": "linear", "rope_type": "yarn", "factor": 2.0},
        {"type": "linear", "factor": "2"},
        {"type": "linear", "factor": 0},
        {"type": "linear", "factor": True},
        {"type": "su", **SU, "short_factor": 1.0},
        {"type": "su", **SU, "long_factor": ["x"]},
    ],
)
def test_rope_scaling_that_cannot_work(rope: dict[str, Any], resolve: Resolve) -> None:
    with pytest.raises(ConfigError, match="rope_scaling") as caught:
        resolve(rope_scaling=rope)
    assert caught.value.param == "rope_scaling"


def test_models_own_rope_that_cannot_work(resolve: Resolve) -> None:
    for rope in ({"type": "linear"}, {"rope_type": "cubic", "factor": 2.0}):
        with pytest.raises(ConfigError, match=r"factor|cubic"):
            resolve(config={"rope_scaling": rope})


# --- data type


@pytest.mark.parametrize(
    ("requested", "stored", "device", "expected"),
    [
        ("auto", "bfloat16", HOPPER, "bfloat16"),
        ("auto", "float16", HOPPER, "float16"),
        ("auto", "float32", HOPPER, "float16"),
        ("auto", None, HOPPER, "float16"),
        ("auto", "float32", CPU, "bfloat16"),
        ("auto", "float16", CPU, "bfloat16"),
        ("half", "float32", HOPPER, "float16"),
        ("float", "float16", CPU, "float32"),
        ("float32", "bfloat16", CPU, "float32"),
        ("BFloat16", "bfloat16", CPU, "bfloat16"),
        ("half", "bfloat16", TURING, "float16"),
    ],
)
def test_dtype(requested: str, stored: str | None, device: DeviceConfig, expected: str) -> None:
    assert resolve_dtype(requested, stored, device) == expected


def test_dtype_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "aserve")
    resolve_dtype("auto", "float32", CPU)
    resolve_dtype("float32", "bfloat16", CPU)
    assert caplog.text == ""
    resolve_dtype("float16", "float32", CPU)
    assert "using bfloat16 instead" in caplog.text
    caplog.clear()
    resolve_dtype("half", "bfloat16", HOPPER)
    assert "casting a bfloat16 model to float16" in caplog.text


def test_dtype_errors() -> None:
    for requested, stored in (("auto", "bfloat16"), ("bfloat16", "float32")):
        with pytest.raises(ConfigError, match=r"compute capability 8\.0 .* 7\.5; use dtype='half'"):
            resolve_dtype(requested, stored, TURING)
    with pytest.raises(ConfigError, match="float64"):
        resolve_dtype("auto", "float64", CPU)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_dtype_key_of_either_config_style(key: str, resolve: Resolve) -> None:
    config = {"torch_dtype": ..., key: "float16"}
    assert resolve(config=config, dtype="float32").model.dtype == "float32"
    assert resolve(config=config).model.dtype == "bfloat16"
    assert isinstance(resolve(config=config).model.dtype, str)


# --- shapes and architectures


def test_llama_shape(resolve: Resolve) -> None:
    model = resolve().model
    assert (model.architecture, model.num_layers, model.num_attention_heads) == ("LlamaForCausalLM", 2, 4)
    assert (model.num_kv_heads, model.head_size, model.hidden_size, model.vocab_size) == (2, 16, 64, 256)
    assert model.sliding_window is None


def test_gemma_shape(resolve: Resolve, make_model: MakeModel) -> None:
    model = resolve(model=make_model(GEMMA)).model
    assert (model.architecture, model.head_size, model.num_kv_heads) == ("Gemma3ForCausalLM", 32, 1)
    assert (model.sliding_window, model.max_model_len) == (32, 1024)


def test_opt_shape(resolve: Resolve, make_model: MakeModel) -> None:
    model = resolve(model=make_model(OPT)).model
    assert (model.num_kv_heads, model.head_size, model.max_model_len) == (4, 16, 512)


@pytest.mark.parametrize(
    ("used", "expected"), [({"use_sliding_window": True, "max_window_layers": 0}, 64), ({}, None)]
)
def test_qwen_window_is_used_only_if_switched_on(
    used: dict[str, Any], expected: int | None, resolve: Resolve
) -> None:
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 64, **used}
    assert resolve(config=config).model.sliding_window == expected


@pytest.mark.parametrize("named", [["MambaForCausalLM"], [], ...])
def test_unknown_architecture_lists_the_known_ones(named: Any, resolve: Resolve) -> None:
    with pytest.raises(ConfigError, match="not known") as caught:
        resolve(config={"architectures": named})
    for name in registry.models:
        assert name in str(caught.value)


def test_architecture_from_outside(resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    table = dict(registry.models._table)
    monkeypatch.setattr(registry.models, "_table", table)
    registry.models.register("MineForCausalLM", "mine.model:Mine")
    config = resolve(config={"architectures": ["OtherForCausalLM", "MineForCausalLM"]})
    assert config.model.architecture == "MineForCausalLM"


# --- where the config comes from


def test_directory_without_a_config(resolve: Resolve, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve(model=str(tmp_path))


def test_model_that_is_nowhere(resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any, **kwargs: Any) -> None:
        raise OSError("not a local folder and not on the hub")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", absent)
    with pytest.raises(ConfigError, match=r"cannot read the config of no/such: not a local folder"):
        resolve(model="no/such")


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '{"model_type": "no-such-type"}', '{"model_type": "llama", "hidden_size": "x"}'],
)
def test_unreadable_config(text: str, resolve: Resolve, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="cannot read the config"):
        resolve(model=str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_remote_code_names_the_flag(resolve: Resolve) -> None:
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration.Mine"}}
    with pytest.raises(ConfigError, match="--trust-remote-code") as caught:
        resolve(config=config)
    assert caught.value.param == "trust_remote_code"


def test_arguments_of_the_config_reader(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    real = AutoConfig.from_pretrained(make_model())
    seen: dict[str, Any] = {}

    def fake(model: str, **kwargs: Any) -> Any:
        seen.update(kwargs, model=model)
        return real

    monkeypatch.setattr(AutoConfig, "from_pretrained", fake)
    args = EngineArgs(
        "org/name", revision="r", code_revision="c", trust_remote_code=True, download_dir="/d", device="cpu"
    )
    model = args.create_engine_config().model
    assert seen == {
        "model": "org/name",
        "revision": "r",
        "code_revision": "c",
        "trust_remote_code": True,
        "cache_dir": "/d",
    }
    assert (model.revision, model.code_revision, model.tokenizer_revision) == ("r", "c", "r")


@pytest.fixture
def gguf(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A .gguf file whose config reader is a stand-in."""
    from transformers import AutoConfig

    path = tmp_path / "tiny.GGUF"
    path.write_bytes(b"GGUF")
    read = {str(path): AutoConfig.from_pretrained(make_model())}

    class Readers:
        def load(self, name: str) -> Any:
            assert name == "gguf"
            return read.__getitem__

    monkeypatch.setattr(registry, "config_readers", Readers())
    return str(path)


def test_gguf_file(gguf: str, resolve: Resolve) -> None:
    for arguments in ({}, {"load_format": "gguf"}, {"quantization": "gguf"}):
        config = resolve(model=gguf, **arguments)
        assert (config.model.model, config.model.quantization) == (gguf, "gguf")
        assert config.load.load_format == "gguf"
    assert resolve(model=gguf, load_format="dummy").load.load_format == "dummy"


def test_float32_by_name_decodes_a_gguf_file(gguf: str, resolve: Resolve) -> None:
    for dtype in ("float32", "float", "Float32"):
        assert resolve(model=gguf, dtype=dtype).model.quantization is None
    packed = resolve(model=gguf, dtype="float32", quantization="gguf").model
    assert (packed.quantization, packed.dtype) == ("gguf", "float32")
    for dtype in ("auto", "bfloat16", "half"):
        assert resolve(model=gguf, dtype=dtype).model.quantization == "gguf"


@pytest.mark.parametrize(
    ("argument", "value"), [("load_format", "safetensors"), ("load_format", "pt"), ("quantization", "awq")]
)
def test_gguf_file_under_another_name(argument: str, value: str, gguf: str, resolve: Resolve) -> None:
    with pytest.raises(ConfigError, match=rf"{argument} '{value}' .*\.gguf file"):
        resolve(model=gguf, **{argument: value})


def test_packaged_names(gguf: str, resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "resolve", {"tiny": gguf}.get)
    model = resolve(model="tiny").model
    assert (model.model, model.tokenizer, model.served_model_name) == (gguf, gguf, ["tiny"])
    assert resolve(model="tiny", tokenizer="other/tok").model.tokenizer == "other/tok"


# --- names, revisions, small print


def test_served_names(resolve: Resolve, make_model: MakeModel) -> None:
    directory = make_model()
    for given, expected in ((None, [directory]), ([], [directory]), (["a", "b"], ["a", "b"])):
        assert resolve(model=directory, served_model_name=given).model.served_model_name == expected


def test_tokenizer_revision(resolve: Resolve) -> None:
    assert resolve(revision="r", tokenizer_revision="t").model.tokenizer_revision == "t"
    assert resolve(revision="r").model.tokenizer_revision == "r"
    assert resolve().model.tokenizer_revision is None


def test_recorded_as_given(resolve: Resolve) -> None:
    model = resolve(
        tokenizer_mode="Slow", skip_tokenizer_init=True, seed=9, max_logprobs=0, enforce_eager=True
    ).model
    assert (model.tokenizer_mode, model.skip_tokenizer_init, model.seed) == ("slow", True, 9)
    assert (model.max_logprobs, model.enforce_eager) == (0, True)
    assert resolve(max_seq_len_to_capture=4096).model.max_seq_len_to_capture == 2048
    assert resolve(max_seq_len_to_capture=100).model.max_seq_len_to_capture == 100
