"""Text that arrives token by token is the decoding of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.tokenization_python import PreTrainedTokenizer

from aserve import packaged
from aserve.tokenizer.detokenizer import Detokenizer
from aserve.tokenizer.loader import load_tokenizer

BAD = "\ufffd"
NAMES = ("smollm2", "gemma3-270m")
HIGH = [*range(0x80, 0xC0), *range(0xC2, 0xF1), 0xF3, 0xF4]
"""Bytes of characters beyond ASCII that both vocabularies have."""
TEXTS = (
    "Hello, world! It's 12 o'clock.",
    " leading space",
    "   three\n\n\ttabs and\r\nlines  ",
    "emoji 😀👩‍👩‍👧‍👦🫠 done 🏳️‍🌈",
    "你好,世界。吾輩は猫である。",
    "Съешь же ещё этих мягких французских булок",
    "𓀀𓀁 hieroglyphs, ᠮᠣᠩᠭᠣᠯ, አማርኛ",
    "a\u0301 combining, \u200d joiner, \ufffd itself",
    "",
)
_loaded: dict[str, Any] = {}


def get(name: str) -> Any:
    if name not in _loaded:
        _loaded[name] = load_tokenizer(str(packaged.resolve(name)))
    return _loaded[name]


def byte_token(name: str, byte: int) -> int:
    """The token that is one byte of a character."""
    tokenizer = get(name)
    if name == "gemma3-270m":
        token = f"<0x{byte:02X}>"
    else:
        token = sorted(c for c in range(256) if chr(c).isprintable() and chr(c) != " " and c != 0xAD)
        shifted = [c for c in range(256) if c not in token]
        token = chr(byte) if byte in token else chr(256 + shifted.index(byte))
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert token_id != tokenizer.unk_token_id, (name, hex(byte))
    return int(token_id)


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    """One per token, and what is flushed at the end."""
    return [*detokenizer.append(ids), detokenizer.flush()]


def whole(tokenizer: Any, ids: list[int], skip: bool = True) -> str:
    return str(tokenizer.decode([i for i in ids if i < len(tokenizer)], skip_special_tokens=skip))


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    """Random ids: of any kind, special ones, single bytes, and ones outside the vocabulary.

    Gemma's decoder spoils a whole run of byte tokens for one bad byte, so bytes stand alone there.
    """
    size = len(get(name))
    byte = st.sampled_from(HIGH).map(lambda value: byte_token(name, value))
    alone = st.tuples(byte, st.integers(1000, size - 1)).map(list)
    several = st.lists(byte, max_size=6) if name == "smollm2" else alone
    one = st.one_of(st.integers(1000, size - 1), st.integers(0, 16), st.integers(size, 2 * size))
    return st.lists(st.one_of(one.map(lambda token: [token]), several), max_size=12).map(
        lambda parts: [token for part in parts for token in part]
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skip", [True, False])
def test_random_ids(name: str, skip: bool) -> None:
    tokenizer = get(name)

    @given(ids_of(name), st.sampled_from(TEXTS), st.integers(0, 12))
    @settings(max_examples=150, deadline=None)
    def check(ids: list[int], prompt: str, fork_at: int) -> None:
        detokenizer = Detokenizer(tokenizer, tokenizer.encode(prompt), skip_special_tokens=skip)
        first = detokenizer.append(ids[:fork_at])
        fork = detokenizer.fork()
        got = pieces(detokenizer, ids[fork_at:])
        assert pieces(fork, ids[fork_at:]) == got
        assert len(first) + len(got) == len(ids) + 1
        assert "".join(first + got) == whole(tokenizer, ids, skip)

    check()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "The prompt", "ends in a space ", "𓀀𓀀𓀀"])
def test_text_comes_back(name: str, text: str, prompt: str) -> None:
    tokenizer = get(name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    got = pieces(Detokenizer(tokenizer, tokenizer.encode(prompt, add_special_tokens=False)), ids)
    assert "".join(got) == text
    if BAD not in text:
        assert not any(BAD in piece for piece in got)
    assert got[-1] == "" or BAD in text


@pytest.mark.parametrize("name", NAMES)
def test_a_character_split_over_tokens_appears_when_complete(name: str) -> None:
    tokenizer = get(name)
    ids = [byte_token(name, byte) for byte in "é😀".encode()]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("x"))
    assert pieces(detokenizer, ids) == ["", "é", "", "", "", "😀", ""]


@pytest.mark.parametrize("name", NAMES)
def test_an_incomplete_character_is_flushed_at_the_end(name: str) -> None:
    tokenizer = get(name)
    ids = [*tokenizer.encode("ab", add_special_tokens=False), byte_token(name, 0xE2), byte_token(name, 0x82)]
    got = pieces(Detokenizer(tokenizer, [5000]), ids)
    assert got[-3:-1] == ["", ""] and BAD in got[-1] and "".join(got) == whole(tokenizer, ids)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_that_end_or_begin_inside_a_character(name: str) -> None:
    tokenizer = get(name)
    sign = [byte_token(name, byte) for byte in "𓀀".encode()]
    text = tokenizer.encode(" then words", add_special_tokens=False)
    # The context starts in the middle of the first sign.
    assert "".join(pieces(Detokenizer(tokenizer, sign * 2), sign + text)) == "𓀀 then words"
    for cut in (1, 2, 3):
        assert "".join(pieces(Detokenizer(tokenizer, sign[:cut]), text)) == " then words"
        got = "".join(pieces(Detokenizer(tokenizer, [5000, *sign[:cut]]), sign[cut:] + text))
        assert got == whole(tokenizer, sign[cut:] + text)


def test_byte_runs_that_turn_bad_keep_everything_else() -> None:
    name = "gemma3-270m"
    tokenizer = get(name)
    byte = st.sampled_from(HIGH).map(lambda value: byte_token(name, value))
    good = st.sampled_from("é€😀").map(lambda c: [byte_token(name, value) for value in c.encode()])
    word = st.sampled_from([" yes", "no", "\n"]).map(lambda w: tokenizer.encode(w, add_special_tokens=False))

    @given(st.lists(st.one_of(byte.map(lambda token: [token]), good, word), max_size=15))
    @settings(max_examples=150, deadline=None)
    def check(parts: list[list[int]]) -> None:
        ids = [token for part in parts for token in part]
        got = "".join(pieces(Detokenizer(tokenizer, [5000]), ids))
        exact = whole(tokenizer, ids)
        assert [c for c in got if c.isascii()] == [c for c in exact if c.isascii()]
        if BAD not in exact:
            assert got == exact

    check()


def watched(detokenizer: Detokenizer) -> list[int]:
    """Lengths of what is decoded from now on."""
    lengths: list[int] = []
    decode = detokenizer._decode

    def count(ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    detokenizer._decode = count
    return lengths


@pytest.mark.parametrize("name", NAMES)
def test_endless_bad_bytes_are_handed_out_at_bounded_cost(name: str) -> None:
    tokenizer = get(name)
    detokenizer = Detokenizer(tokenizer, [5000])
    lengths = watched(detokenizer)
    got = detokenizer.append([byte_token(name, 0x80)] * 2000)
    assert sum(map(len, got)) > 1500 and max(lengths, default=0) <= 2 * 256 + 8
    tail = tokenizer.encode(" and on", add_special_tokens=False)
    assert "".join(got + pieces(detokenizer, tail)) == BAD * 2000 + " and on"
    assert len(detokenizer._ids) < 1000


@pytest.mark.parametrize("name", NAMES)
def test_skipped_tokens_cost_nothing_and_leave_the_context(name: str) -> None:
    tokenizer = get(name)
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("A prompt"))
    detokenizer.append([byte_token(name, 0xC3)])
    lengths = watched(detokenizer)
    assert set(detokenizer.append([tokenizer.eos_token_id, len(tokenizer), 10**9] * 1000)) == {""}
    assert lengths == [] and len(detokenizer._ids) < 20
    assert detokenizer.append([byte_token(name, 0xA9)]) == ["é"]


@pytest.mark.parametrize("name", NAMES)
def test_a_long_text_is_decoded_in_short_stretches(name: str) -> None:
    tokenizer = get(name)
    ids = tokenizer.encode("Some words, 中文 и 😀. ", add_special_tokens=False) * 100
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("A prompt"))
    lengths = watched(detokenizer)
    assert "".join(pieces(detokenizer, ids)) == whole(tokenizer, ids)
    assert max(lengths, default=0) < 20 and len(detokenizer._ids) < 200


def test_every_token_of_a_byte_level_vocabulary_has_the_text_it_decodes_to() -> None:
    tokenizer = get("smollm2")
    detokenizer = Detokenizer(tokenizer, [5000], skip_special_tokens=False)
    lengths = watched(detokenizer)
    backend = tokenizer.backend_tokenizer
    for token_id in range(len(tokenizer)):
        piece = detokenizer.push(token_id) + detokenizer.flush()
        detokenizer._partial = False
        assert piece == backend.decode([token_id], skip_special_tokens=False), token_id
    assert lengths == []


def test_added_tokens_of_a_byte_level_tokenizer() -> None:
    """They are written as they are, unless all their characters happen to stand for bytes."""
    vocab = {token: index for index, token in enumerate(["a", "Ã", "©", "Ġ"])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.decoder = decoders.ByteLevel()
    added = ["<x>", "two words", "中", "Ġb", "é", "\ufffd"]
    backend.add_tokens(added)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = list(range(len(vocab) + len(added)))

    @given(st.lists(st.sampled_from([*ids, len(ids)]), max_size=12))
    @settings(max_examples=200, deadline=None)
    def check(chosen: list[int]) -> None:
        detokenizer = Detokenizer(tokenizer, [0])
        assert detokenizer._table is not None
        assert "".join(pieces(detokenizer, chosen)) == whole(tokenizer, chosen)

    check()


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.Metaspace(), None])
def test_other_decoders_are_asked_themselves(decoder: Any) -> None:
    vocab = {token: index for index, token in enumerate(["a", "##b", "▁c", "é", "d"])}
    backend = Tokenizer(models.BPE(vocab, []))
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    detokenizer = Detokenizer(tokenizer, [])
    assert detokenizer._table is None
    output = [0, 1, 2, 3, 4, 1]
    assert "".join(pieces(detokenizer, output)) == whole(tokenizer, output)


def test_special_tokens_skipped_or_kept() -> None:
    tokenizer = get("smollm2")
    end = tokenizer.eos_token_id
    ids = [*tokenizer.encode("Hi", add_special_tokens=False), end, *tokenizer.encode(" you")]
    assert "".join(pieces(Detokenizer(tokenizer, [5000]), ids)) == "Hi you"
    kept = pieces(Detokenizer(tokenizer, [5000, end], skip_special_tokens=False), ids)
    assert "".join(kept) == "Hi<|im_end|> you"


def test_a_stripping_decoder_keeps_the_space_after_a_prompt() -> None:
    """Llama's: a space at the start of a text is not part of it."""
    names = ["<unk>", "</s>", "▁", "▁Hi", "▁you", "a", *(f"<0x{byte:02X}>" for byte in "é".encode())]
    vocab = {token: index for index, token in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    output = [3, 4, 6, 7, 4]
    assert "".join(pieces(Detokenizer(tokenizer, [5]), output)) == " Hi youé you"
    assert "".join(pieces(Detokenizer(tokenizer, [5, 6, 7]), output)) == " Hi youé you"
    assert "".join(pieces(Detokenizer(tokenizer, [7, 5]), output)) == " Hi youé you"
    assert "".join(pieces(Detokenizer(tokenizer, []), output)) == "Hi youé you" == tokenizer.decode(output)
    assert "".join(pieces(Detokenizer(tokenizer, [5]), [1, 3])) == " Hi"
    assert "".join(pieces(Detokenizer(tokenizer, []), [2, 3])) == " Hi" == tokenizer.decode([2, 3])


class Words(PreTrainedTokenizer):
    """A slow tokenizer of a few words; ``_`` stands for a space, as in SentencePiece."""

    VOCAB = ("<unk>", "</s>", "_one", "_two", "three", "_")

    def __init__(self, **options: Any) -> None:
        self._vocab = {token: index for index, token in enumerate(self.VOCAB)}
        super().__init__(unk_token="<unk>", eos_token="</s>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self._vocab)

    def get_vocab(self) -> dict[str, int]:
        return {**self._vocab, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        raise NotImplementedError

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocab.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.VOCAB[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("_", " ").strip()


@pytest.fixture(scope="module")
def words() -> Words:
    tokenizer = Words()
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("<sep>", special=False)])
    assert not tokenizer.is_fast and tokenizer.convert_tokens_to_ids(["<tool>", "<sep>"]) == [6, 7]
    return tokenizer


def test_a_slow_tokenizer(words: Words) -> None:
    got = Detokenizer(words, []).append([2, 3, 4, 5, 2, 9])
    assert got == ["one", " two", "three", "", "  one", ""]
    assert "".join(pieces(Detokenizer(words, [4]), [2, 3])) == " one two"


def test_spaces_between_added_tokens_of_a_slow_tokenizer(words: Words) -> None:
    ids = [2, 6, 7, 3, 4, 1, 2]

    def text(**options: bool) -> str:
        return "".join(pieces(Detokenizer(words, [], **options), ids))

    assert text() == "one <tool> <sep> twothree one"
    assert text(spaces_between_special_tokens=False) == "one<tool><sep>twothree one"
    assert text(skip_special_tokens=False) == "one <tool> <sep> twothree </s> one"
    glued = text(skip_special_tokens=False, spaces_between_special_tokens=False)
    assert glued == "one<tool><sep>twothree</s>one"


def test_spaces_between_added_tokens_mean_nothing_to_a_fast_tokenizer(smollm2_path: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2_path))
    ids = [5000, tokenizer.eos_token_id, 5001]
    got = [
        pieces(
            Detokenizer(tokenizer, [1], skip_special_tokens=False, spaces_between_special_tokens=spaces), ids
        )
        for spaces in (True, False)
    ]
    assert got[0] == got[1]
