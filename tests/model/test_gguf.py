"""GGUF files: header, block formats, configuration, and the packaged models against transformers."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from aserve.errors import ConfigError
from aserve.gguf.config import read_config
from aserve.gguf.reader import open_gguf
from aserve.model.loader.dequant import dequantize
from tests.model import tiny
from tests.model.paged import load, stepwise_logits, whole_logits

QUANTISABLE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
RANDOM_BLOCKS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL"]
# Where in a block the float16 scales are; the other bytes may be anything.
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "IQ4_NL": (0,), "Q8_0": (0,), "Q4_0": (0,)}


def random_blocks(name: str, rows: int, columns: int) -> np.ndarray:
    """Blocks of every bit pattern but for their scales, which are finite: uint8 ``[rows, bytes]``."""
    rng = np.random.default_rng(len(name))
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    raw = rng.integers(0, 256, (rows * columns // per_block, block_bytes), dtype=np.uint8)
    for position in HALVES.get(name, (0,) if name == "Q5_0" else (0, 2)):
        scales = rng.standard_normal(len(raw)).astype(np.float16)
        raw[:, position : position + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", RANDOM_BLOCKS)
def test_block_formats_equal_the_gguf_packages(name: str) -> None:
    kind = GGMLQuantizationType[name]
    raw = random_blocks(name, 19, 768)
    decoded = dequantize(torch.from_numpy(raw.reshape(-1)), kind.value, (19, 768), torch.float32)
    np.testing.assert_array_equal(decoded.numpy(), gguf.quants.dequantize(raw, kind))


@pytest.mark.parametrize("name", QUANTISABLE)
def test_round_trip_through_the_gguf_packages_quantiser(name: str) -> None:
    kind = GGMLQuantizationType[name]
    values = np.random.default_rng(1).standard_normal((7, 64)).astype(np.float32)
    raw = torch.from_numpy(gguf.quants.quantize(values, kind).reshape(-1).view(np.uint8).copy())
    decoded = dequantize(raw, kind.value, values.shape, torch.float32).numpy()
    worst = {"F32": 0.0, "F16": 0.002, "BF16": 0.02, "Q8_0": 0.02, "Q5_0": 0.2, "Q5_1": 0.15}.get(name, 0.4)
    assert np.abs(decoded - values).max() <= worst


def test_large_tensors_are_decoded_in_pieces_without_a_seam() -> None:
    raw = random_blocks("Q4_1", 1100, 1024)  # more than one piece
    decoded = dequantize(torch.from_numpy(raw.reshape(-1)), 3, (1100, 1024), torch.bfloat16)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, GGMLQuantizationType.Q4_1)).bfloat16()
    assert torch.equal(decoded, expected)


def test_unsupported_type_is_named() -> None:
    with pytest.raises(ConfigError, match="type I8 are not supported"):
        dequantize(torch.zeros(64, dtype=torch.uint8), GGMLQuantizationType.I8.value, (64,), torch.float32)


def to_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp stores Llama's q and k: halves of each head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, architecture: str, family: str, **changes: Any) -> Any:
    """Writes a tiny model the way llama.cpp's converter does; returns the transformers model."""
    reference = tiny.make(family, **changes)
    config = reference.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if architecture == "gemma3":
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_sliding_window(config.sliding_window)
        local = [kind == "sliding_attention" for kind in config.layer_types]
        writer.add_array("gemma3.attention.sliding_window_pattern", local)
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}.get(
            architecture, gguf.MODEL_ARCH.GEMMA3
        ),
        config.num_hidden_layers,
    )
    for name, tensor in reference.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if architecture == "llama" and ".q_proj.weight" in name:
            values = to_pairs(values, config.num_attention_heads)
        if architecture == "llama" and ".k_proj.weight" in name:
            values = to_pairs(values, config.num_key_value_heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return reference


@pytest.mark.parametrize(
    ("architecture", "family", "changes"),
    [
        ("llama", "llama", {}),
        ("llama", "llama-wide-heads", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {}),
        ("gemma3", "gemma3", {"query_pre_attn_scalar": 16}),
    ],
)
def test_converted_models_give_the_same_logits(
    architecture: str, family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    reference = write_gguf(path, architecture, family, **changes)
    config = read_config(str(path))
    assert config.tie_word_embeddings == reference.config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert (config.vocab_size, config.dtype) == (tiny.VOCABULARY, torch.float32)
    tokens = tiny.tokens()
    logits = whole_logits(load(path, config, 50), tokens)
    torch.testing.assert_close(logits, tiny.reference_logits(reference, tokens), atol=1e-4, rtol=1e-4)


def test_config_of_smollm2(smollm2_path: Path) -> None:
    config = read_config(str(smollm2_path))
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (576, 30, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert (config.bos_token_id, config.eos_token_id, config.tie_word_embeddings) == (1, 2, True)
    assert config.dtype == torch.bfloat16


def test_config_of_gemma3(gemma3_path: Path) -> None:
    config = read_config(str(gemma3_path))
    assert config.architectures == ["Gemma3ForCausalLM"]
    assert (config.head_dim, config.query_pre_attn_scalar, config.sliding_window) == (256, 256, 512)
    assert [kind == "full_attention" for kind in config.layer_types] == [i % 6 == 5 for i in range(18)]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (262144, 2, 1)
    assert config.attn_logit_softcapping is None and config.final_logit_softcapping is None


def test_header_equals_the_gguf_packages(smollm2_path: Path) -> None:
    file, reader = open_gguf(str(smollm2_path)), gguf.GGUFReader(smollm2_path)
    assert {t.name: (t.data_offset, t.n_bytes, t.tensor_type.value) for t in reader.tensors} == {
        t.name: (t.offset, t.num_bytes, t.ggml_type) for t in file.tensors.values()
    }
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or len(field.data) > 100:
            continue
        value = file.metadata[key]
        assert (value.to_list() if hasattr(value, "to_list") else value) == field.contents(), key
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == 49152 and tokens.to_list()[:2] == ["<|endoftext|>", "<|im_start|>"]
    tensor = next(t for t in reader.tensors if t.name == "blk.7.ffn_up.weight")
    info = file.tensors[tensor.name]
    raw = torch.from_numpy(file.tensor_bytes(info))
    decoded = dequantize(raw, info.ggml_type, info.shape, torch.float32)
    np.testing.assert_array_equal(decoded, gguf.quants.dequantize(tensor.data, tensor.tensor_type))


# Token ids and the five largest logits of the last one, by transformers 5.23 reading the same files with
# from_pretrained(..., gguf_file=..., dtype=torch.float32); then its greedy continuation.
SMOLLM2_PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
SMOLLM2_TOP = {504: 27.8588, 60: 26.1295, 38634: 26.1015, 15319: 25.9623, 7026: 25.1814}
SMOLLM2_NEXT = [504, 3575, 282, 4649, 314, 7042, 30, 2]
GEMMA3_PROMPT = [2, 818, 5279, 529, 7001, 563]
GEMMA3_TOP = {506: 19.0915, 496: 18.5476, 9079: 18.2686, 886: 18.113, 3224: 17.7839}
GEMMA3_NEXT = [506, 5279, 529, 506, 2891, 529, 7001, 236761, 1030, 563, 506, 7488, 3207, 528, 7001]


@pytest.mark.parametrize(
    ("fixture", "prompt", "top", "continuation"),
    [
        ("smollm2_path", SMOLLM2_PROMPT, SMOLLM2_TOP, SMOLLM2_NEXT),
        ("gemma3_path", GEMMA3_PROMPT, GEMMA3_TOP, GEMMA3_NEXT),
    ],
)
def test_packaged_models_say_what_transformers_says(
    fixture: str,
    prompt: list[int],
    top: dict[int, float],
    continuation: list[int],
    request: pytest.FixtureRequest,
) -> None:
    path = request.getfixturevalue(fixture)
    model = load(path, read_config(str(path)), 64)
    logits = stepwise_logits(model, prompt + continuation[:-1], len(prompt), block_size=16)
    values, ids = logits[len(prompt) - 1].topk(5)
    assert dict(zip(ids.tolist(), values.tolist(), strict=True)) == pytest.approx(top, abs=1e-3)
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == continuation


def write_metadata(path: Path, architecture: str = "llama", **values: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_llama3_frequencies_become_divisors(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("context_length", 64),
        ("block_count", 1),
        ("embedding_length", 48),
        ("feed_forward_length", 80),
        ("attention.head_count", 4),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((10, 48), np.float32))
    writer.add_tensor("rope_freqs.weight", np.array([1, 1, 2, 4, 8, 8], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rope = read_config(str(path)).rope_parameters
    assert rope["rope_type"] == "longrope" and rope["attention_factor"] == 1.0
    assert rope["short_factor"] == rope["long_factor"] == [1, 1, 2, 4, 8, 8]


def test_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "m.gguf", "mamba")
    with pytest.raises(ConfigError, match="'mamba' is not supported; known: gemma3, llama, qwen2, qwen3"):
        read_config(str(path))


def test_missing_key_is_named(tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "m.gguf", llama__context_length=10)
    with pytest.raises(ConfigError, match=r"GGUF key llama.block_count is missing"):
        read_config(str(path))


def test_experts_and_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mixture-of-experts"):
        read_config(str(write_metadata(tmp_path / "a.gguf", llama__expert_count=8)))
    with pytest.raises(ConfigError, match="one part of a split GGUF"):
        read_config(str(write_metadata(tmp_path / "b.gguf", split__count=3)))


def test_files_that_are_not_gguf(tmp_path: Path, smollm2_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(ConfigError, match="cannot read GGUF file"):
        open_gguf(str(path))
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot read GGUF file"):
        open_gguf(str(path))
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ConfigError, match="is not a GGUF file"):
        open_gguf(str(path))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ConfigError, match="version 1 is not supported"):
        open_gguf(str(path))
    with smollm2_path.open("rb") as source:
        head = source.read(3_000_000)
    for end in (30, 1000, 200_000, len(head)):
        path.write_bytes(head[:end])
        with pytest.raises(ConfigError, match="is not a whole GGUF file"):
            open_gguf(str(path))


def test_hostile_lengths_end_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for keys, body in (
        (1 << 60, b""),
        (1, struct.pack("<Q", 1 << 62)),
        (1, struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 1 << 60)),
        (1, struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 1 << 60)),
        (1, struct.pack("<Q1sI", 1, b"a", 77)),
    ):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, keys) + body)
        with pytest.raises(ConfigError, match="is not a whole GGUF file"):
            open_gguf(str(path))
