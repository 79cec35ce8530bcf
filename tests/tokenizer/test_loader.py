"""Tokenizers from folders and GGUF files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aserve.errors import ConfigError
from aserve.tokenizer.gguf import derive_merges
from aserve.tokenizer.loader import load_generation_eos, load_tokenizer

# Ids that transformers 5.23 gives each text with the tokenizer it converts from the same file.
EXPECTED: dict[str, list[list[Any]]] = json.loads(
    (Path(__file__).parent / "gguf_ids.json").read_text(encoding="utf-8")
)


def small_tokenizer(folder: Path) -> Path:
    """A folder with a byte-level tokenizer of 260 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet, "he", "hel"])}
    backend = Tokenizer(models.BPE(vocabulary, [("h", "e"), ("he", "l")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "fixture"), [("smollm2", "smollm2_path"), ("gemma3-270m", "gemma3_path")])
def test_gguf_tokenizer_gives_transformers_ids(
    name: str, fixture: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = load_tokenizer(str(request.getfixturevalue(fixture)))
    assert tokenizer.is_fast
    for text, ids in EXPECTED[name]:
        assert tokenizer(text).input_ids == ids, text
        if "▁" not in text:  # to a SentencePiece vocabulary that is a space
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_smollm2_cuts_numbers_before_spaces(smollm2_path: Path) -> None:
    """Its tokenizer was trained with every digit alone; transformers' conversion drops that step, which
    shows where several spaces precede a digit."""
    tokenizer = load_tokenizer(str(smollm2_path))
    assert tokenizer.tokenize("a   5") == ["a", "ĠĠĠ", "5"]
    assert tokenizer.tokenize("12") == ["1", "2"]


def test_special_tokens_and_template_come_from_the_file(smollm2_path: Path, gemma3_path: Path) -> None:
    smollm2, gemma3 = load_tokenizer(str(smollm2_path)), load_tokenizer(str(gemma3_path))
    assert (smollm2.bos_token, smollm2.eos_token, smollm2.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert smollm2.chat_template.startswith("{% for message in messages %}")
    assert len(smollm2) == 49152 and smollm2("hi").input_ids[0] != smollm2.bos_token_id
    assert (gemma3.bos_token_id, gemma3.eos_token_id, gemma3.unk_token_id) == (2, 1, 3)
    assert gemma3.chat_template is None
    assert len(gemma3) == 262144 and gemma3("hi").input_ids[0] == 2
    assert gemma3("hi", add_special_tokens=False).input_ids[0] != 2
    assert gemma3.decode([2, 105, 2202, 107], skip_special_tokens=True) == "hi\n"


def test_converted_tokenizer_is_kept_and_read_back(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = load_tokenizer(str(smollm2_path))
    kept = list((tmp_path / "aserve" / "tokenizers").iterdir())
    assert [file.suffix for file in kept] == [".json"]
    monkeypatch.setattr("aserve.tokenizer.gguf.convert", None)  # a second conversion would fail
    second = load_tokenizer(str(smollm2_path))
    assert second("Some text, 1 2 3").input_ids == first("Some text, 1 2 3").input_ids


def test_a_cache_that_cannot_be_written_costs_only_time(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(str(smollm2_path))
    assert "cannot be kept" in caplog.text
    text, ids = EXPECTED["smollm2"][0]
    assert tokenizer(text).input_ids == ids


def write_tokenizer(path: Path, **values: Any) -> str:
    writer = gguf.GGUFWriter(path, values.pop("architecture", "llama"))
    for key, value in values.items():
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)


def sentencepiece_file(path: Path, **changes: Any) -> str:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "a", "b", "c", "ab", "▁a", "▁ab", "abc"]
    values: dict[str, Any] = {
        "model": "llama",
        "tokens": pieces + words,
        "scores": [0.0] * len(pieces) + [-9.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -4.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return write_tokenizer(path, **values | changes)


def test_sentencepiece_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer = load_tokenizer(sentencepiece_file(tmp_path / "a.gguf"))
    assert tokenizer.tokenize("abc", add_special_tokens=True) == ["<s>", "▁ab", "c"]
    assert tokenizer.decode(tokenizer("abc ab").input_ids, skip_special_tokens=True) == "abc ab"
    assert tokenizer.tokenize("aé") == ["▁a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer("aé").input_ids, skip_special_tokens=True) == "aé"
    plain = load_tokenizer(
        sentencepiece_file(
            tmp_path / "b.gguf", add_space_prefix=False, add_bos_token=False, add_eos_token=True
        )
    )
    assert plain.tokenize("abc", add_special_tokens=True) == ["abc", "</s>"]


def test_merges_follow_the_scores() -> None:
    merges = derive_merges(["a", "b", "c", "ab", "bc", "abc"], [0, 0, 0, -2, -1, -3])
    assert merges == [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "holds no tokenizer; name one with --tokenizer"),
        ({"model": "t5", "tokens": ["a"]}, "type 't5' are not supported"),
        ({"model": "gpt2", "pre": "martian", "tokens": ["a"], "merges": ["a b"]}, "pre-tokenizer 'martian'"),
        ({"model": "gpt2", "tokens": ["a"]}, "tokenizer.ggml.merges is missing"),
        ({"model": "llama", "tokens": ["a"]}, "tokenizer.ggml.scores is missing"),
    ],
)
def test_files_without_a_usable_tokenizer(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "m.gguf", **values)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(path)


def test_folder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(small_tokenizer(tmp_path)))
    assert tokenizer.tokenize("hello") == ["hel", "l", "o"]


def test_slow_where_there_is_only_a_fast_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = small_tokenizer(tmp_path)
    with caplog.at_level(logging.WARNING):
        load_tokenizer(str(folder), mode="SLOW")
    assert "There is no slow (Python) tokenizer" in caplog.text


@pytest.mark.parametrize("path", ["nobody/nothing", "/nowhere/at/all"])
def test_nothing_to_load(path: str) -> None:
    with pytest.raises(ConfigError, match=f"no tokenizer could be loaded from {path}"):
        load_tokenizer(path)


def test_unknown_mode(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mode 'fast' is not one of auto, slow"):
        load_tokenizer(str(tmp_path), mode="fast")


def test_code_of_the_repository_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "tokenization_mine.py").write_text("raise RuntimeError('ran')")
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", null]}, "tokenizer_class": "Mine"}'
    )
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [('{"eos_token_id": 7}', {7}), ('{"eos_token_id": [1, 106]}', {1, 106}), ("{}", set())],
)
def test_generation_config_eos(content: str, expected: set[int], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    assert load_generation_eos(str(tmp_path)) == expected


@pytest.mark.parametrize("content", ["[1]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [true]}'])
def test_bad_generation_config(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        load_generation_eos(str(tmp_path))


def test_no_generation_config(tmp_path: Path) -> None:
    assert load_generation_eos(str(tmp_path)) == set()
    assert load_generation_eos("nobody/nothing") == set()


def test_generation_eos_of_gguf_files(smollm2_path: Path, tmp_path: Path) -> None:
    assert load_generation_eos(str(smollm2_path)) == {2}
    path = write_tokenizer(tmp_path / "m.gguf", eos_token_id=1, eot_token_id=106)
    assert load_generation_eos(path) == {1, 106}
