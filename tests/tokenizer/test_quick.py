"""The quick way to token ids gives what the tokenizer gives, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split, Whitespace

from aserve import packaged
from aserve.tokenizer import quick
from aserve.tokenizer.loader import load_tokenizer
from aserve.tokenizer.quick import QuickEncoder, quick_encoder, translate

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUT: dict[str, Callable[[], Any]] = {
    "as it is": lambda: None,
    "gpt2": lambda: ByteLevel(add_prefix_space=False),
    "llama3": lambda: Sequence(
        [Split(Regex(LLAMA3), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
    "qwen2": lambda: Sequence(
        [
            Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "gaps": lambda: Sequence(
        [Split(Regex(r"\p{L}+"), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
    "digits together": lambda: Sequence([Digits(), ByteLevel(add_prefix_space=False)]),
}
_base: list[str] = []
_made: dict[str, tuple[Any, QuickEncoder]] = {}


def smollm2() -> Any:
    if not _base:
        _base.append(load_tokenizer(str(packaged.resolve("smollm2"))).backend_tokenizer.to_str())
    return Tokenizer.from_str(_base[0])


def both(name: str) -> tuple[Any, QuickEncoder]:
    if name not in _made:
        backend = smollm2()
        pre_tokenizer = CUT[name]()
        if pre_tokenizer is not None:
            backend.pre_tokenizer = pre_tokenizer
        if name == "llama3":  # which also begins every text with a token
            backend.post_processor = processors.TemplateProcessing(
                single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
            )
        found = quick_encoder(backend)
        assert found is not None
        _made[name] = backend, found
    return _made[name]


def ids(encoder: QuickEncoder, text: str, special: bool) -> list[int] | None:
    """After as many attempts as it takes to learn the pieces."""
    for _ in range(40):
        found = encoder.encode(text, special)
        if found is not None:
            return found
    return None


KNOWN = [chr(code) for code in range(quick._END) if quick._KNOWN(chr(code))]
USUAL = [chr(code) for code in range(128)] + [
    "  ", "\n\n", " the", "'s", "'LL", " 12", "3.14", "hello", " World", "é", "—", "“", "ß", "\u0301", "\xa0",
    "<|im_start|>", "<|im_end|>", "<|im_", "naïve", " Müller", "привет", "٣", "½", "²",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(USUAL) | st.sampled_from(KNOWN), max_size=24).map("".join)


@pytest.mark.parametrize("name", CUT)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, special=st.booleans())
def test_the_same_ids(name: str, text: str, special: bool) -> None:
    backend, encoder = both(name)
    found = ids(encoder, text, special)
    if found is None:
        assert name == "gaps"
    else:
        assert found == backend.encode(text, add_special_tokens=special).ids


WORDS = st.sampled_from(
    [
        "a",
        "it's",
        "1",
        "1874,",
        "42nd",
        "“Müller”",
        "x=(",
        "++",
        "<|im_end|>",
        "é\nb",
        "2\n",
        "\t7",
        ".\n\n",
        "",
    ]
)
GAPS = st.sampled_from([" ", " ", " ", "  ", "\n ", " \n", "\t ", "\xa0 "])


@pytest.mark.parametrize("name", [name for name in CUT if name != "gaps"])
@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.tuples(WORDS, GAPS), max_size=8))
@example([("a\n", " "), ("1", " ")])
@example([("a\n", " "), ("b", " "), ("", " "), ("1", " ")])
def test_words_between_spaces_have_the_same_ids(name: str, parts: list[tuple[str, str]]) -> None:
    backend, encoder = both(name)
    assert encoder._by_words
    # Every word is known by itself before it occurs among others.
    for word, _ in parts:
        ids(encoder, f"a {word} a", False)
    text = "".join(gap + word for word, gap in parts).removeprefix(" ")
    assert ids(encoder, text, False) == backend.encode(text, add_special_tokens=False).ids


def test_a_text_of_known_words_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, encoder = smollm2(), quick_encoder(smollm2())
    assert encoder is not None
    text = "It rose by 11 feet, and “so” were the sheep."
    expected = backend.encode(text).ids
    for _ in range(3):  # of many new words a few are learned
        assert ids(encoder, text, True) == expected
    monkeypatch.setattr(encoder, "_cuts", [lambda text: [text]])  # the first word is a piece of its own
    assert encoder.encode(text) == expected


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40), special=st.booleans())
def test_any_text_is_the_same_or_left_to_the_tokenizer(text: str, special: bool) -> None:
    backend, encoder = both("as it is")
    found = ids(encoder, text, special)
    assert found is None or found == backend.encode(text, add_special_tokens=special).ids


def test_every_known_character_between_others() -> None:
    for name in ("as it is", "llama3"):
        backend, encoder = both(name)
        for character in KNOWN[::7]:
            text = f"a{character}1 {character}  b{character}{character}\n"
            assert ids(encoder, text, False) == backend.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("text", ["你好", "\u017f", "\u212a", "a\u200b", "\ud800", "x" * 5000, "\u0378"])
def test_what_is_not_known_is_left_to_the_tokenizer(text: str) -> None:
    assert ids(both("as it is")[1], text, True) is None


def test_a_text_of_new_pieces_is_left_to_the_tokenizer_and_learned_from() -> None:
    encoder = quick_encoder(smollm2())
    assert encoder is not None
    text = " ".join(f"w{chr(97 + number)}rd" for number in range(20))
    given_up = 0
    while (found := encoder.encode(text)) is None:
        given_up += 1
    assert given_up == -(-20 // quick.MOST_NEW) - 1
    assert found == smollm2().encode(text).ids


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "MOST_PIECES", 50)
    encoder = quick_encoder(smollm2())
    assert encoder is not None
    for number in range(200):
        encoder.encode(f" a{chr(97 + number % 26)}{chr(97 + number // 26)}")
        encoder.encode("x" * (20 + number))
        assert len(encoder._pieces) <= 50
        assert all(len(piece) <= quick.LONGEST_PIECE for piece in encoder._pieces)


def test_the_words_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "MOST_WORDS", 50)
    encoder = quick_encoder(smollm2())
    assert encoder is not None
    most = 0
    for number in range(200):
        ids(encoder, f"a {number} {'-' * (number % 60)}{number}", False)
        most = max(most, len(encoder._words))
        assert len(encoder._words) <= 50
        assert all(len(word) <= quick.LONGEST_WORD for word in encoder._words)
    assert most > 30


def changed(change: Callable[[Any], object]) -> QuickEncoder | None:
    backend = smollm2()
    change(backend)
    return quick_encoder(backend)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: setattr(b, "normalizer", normalizers.Lowercase()),
        lambda b: setattr(b, "pre_tokenizer", ByteLevel(add_prefix_space=True)),
        lambda b: setattr(b, "pre_tokenizer", Whitespace()),
        lambda b: setattr(b, "pre_tokenizer", Sequence([ByteLevel(add_prefix_space=False), Digits()])),
        lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda b: b.add_tokens([AddedToken("<left>", lstrip=True, normalized=False)]),
        lambda b: b.add_tokens([AddedToken("word", single_word=True, normalized=False)]),
        lambda b: b.add_tokens([AddedToken("later", normalized=True)]),
        lambda b: b.enable_truncation(5),
        lambda b: b.enable_padding(length=200),
        lambda b: setattr(b.model, "dropout", 0.5),
    ],
)
def test_other_tokenizers_have_no_quick_way(change: Callable[[Any], object]) -> None:
    assert changed(change) is None


def test_a_change_that_changes_nothing() -> None:
    assert changed(lambda backend: None) is not None


def test_an_added_token_with_a_space_leaves_words_alone() -> None:
    backend = smollm2()
    backend.add_special_tokens([AddedToken("two words", normalized=False)])
    encoder = quick_encoder(backend)
    assert encoder is not None
    for text in ("a two b", "a words b", "a two words b"):
        assert ids(encoder, text, False) == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "pattern",
    [
        r"\p{M}+",
        r"\P{L}",
        r"\w+",
        r"\d",
        r".",
        r"(a)",
        r"(?=a)",
        r"[a[b]]",
        r"[^\S]",
        r"a++",
        r"[a&&b]",
        r"\X",
    ],
)
def test_patterns_that_are_not_understood(pattern: str) -> None:
    assert translate(pattern) is None
