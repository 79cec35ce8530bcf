"""Every backend: outputs drawn at random from what it allows, judged by independent readers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from _pytest.mark import ParameterSet

from aserve import registry
from aserve.guided.base import Backend, Grammar, GrammarError, GuideSpec, Vocabulary
from aserve.guided.vocabulary import read_vocabulary
from aserve.tokenizer.loader import load_tokenizer
from tests.guided.schemas import SCHEMAS, large_schema
from tests.guided.walking import draw, spell

BACKENDS = list(registry.guided_backends)

REFUSED = {
    "llguidance": {},
    "outlines": {"share": "maximum", "geometry": "exclusiveMinimum", "merged": "allOf"},
    "lm-format-enforcer": {
        "share": "maximum",
        "geometry": "exclusiveMinimum",
        "merged": "allOf",
        "unicode": "characters",
    },
}
"""Schemas that a backend does not do, and what its refusal must name."""


def pairs() -> list[ParameterSet]:
    """Every backend with every schema. Those that llguidance is not done with in no time are slow tests, but
    for some, and for those that are refused."""
    found = []
    for backend in BACKENDS:
        for place, name in enumerate(SCHEMAS):
            quick = backend == "llguidance" or place % 6 == 0 or name in REFUSED[backend]
            found.append(pytest.param(backend, name, marks=() if quick else pytest.mark.slow))
    return found


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest, vocabulary: Vocabulary) -> Backend:
    kind = registry.guided_backends.load(request.param)
    assert kind.missing() is None
    built: Backend = kind(vocabulary)
    built.name = request.param
    return built


def compiled(backend: Backend, kind: str, text: str, whitespace: str | None = None) -> Grammar:
    spec = GuideSpec(backend.name, kind, text, whitespace)
    return backend.load(spec, backend.check(spec))


def outputs(grammar: Grammar, vocabulary: Vocabulary, count: int, most: int = 300) -> list[str]:
    """The texts of those of ``count`` outputs that came to their end."""
    rng = np.random.default_rng(5)
    drawn = [draw(grammar, vocabulary, rng, most) for _ in range(count)]
    return [spell(ids, vocabulary) for ids, ended in drawn if ended]


@pytest.mark.parametrize(("backend", "name"), pairs(), indirect=["backend"])
def test_outputs_are_valid_under_their_schema(backend: Backend, name: str, vocabulary: Vocabulary) -> None:
    reason = REFUSED[backend.name].get(name)
    if reason is not None:
        with pytest.raises(GrammarError, match=reason):
            compiled(backend, "json", json.dumps(SCHEMAS[name]))
        return
    texts = outputs(compiled(backend, "json", json.dumps(SCHEMAS[name])), vocabulary, 4)
    assert texts
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMAS[name])


def test_a_large_schema(vocabulary: Vocabulary) -> None:
    built = registry.guided_backends.load("llguidance")(vocabulary)
    built.name = "llguidance"
    for text in outputs(compiled(built, "json", json.dumps(large_schema())), vocabulary, 3, 1000):
        jsonschema.validate(json.loads(text), large_schema())


@pytest.mark.parametrize(
    "pattern",
    [
        "[a-c]{2,5}x?",
        "^(red|green|blue)-[0-9]{3}$",
        r"[A-Z][a-z]{1,8}( [A-Z][a-z]{1,8}){0,2}",
        r"\d{1,3}(\.\d{1,3}){3}",
        "(a|aa)+",
        r"[^x]{3}\$",
        "(yes|no)?",
    ],
)
def test_outputs_match_their_expression(backend: Backend, pattern: str, vocabulary: Vocabulary) -> None:
    texts = outputs(compiled(backend, "regex", pattern), vocabulary, 10)
    assert len(texts) > 5
    for text in texts:
        assert re.fullmatch(pattern, text), text


def test_outputs_are_among_the_choices(backend: Backend, vocabulary: Vocabulary) -> None:
    choices = ["yes", "no", "yes, but", 'a "quote"', "two\nlines", "a.b*c", "é", "tab\tbed"]
    texts = set(outputs(compiled(backend, "choice", json.dumps(choices)), vocabulary, 60))
    assert texts <= set(choices)
    assert len(texts) >= 5


@pytest.mark.parametrize(
    "grammar",
    ['start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'],
    ids=["lark", "gbnf"],
)
def test_outputs_follow_their_grammar(backend: Backend, grammar: str, vocabulary: Vocabulary) -> None:
    texts = outputs(compiled(backend, "grammar", grammar), vocabulary, 10, 100)
    assert len(texts) > 3
    for text in texts:
        depth = len(text) // 2
        assert text == "(" * depth + "x" + ")" * depth


@pytest.mark.parametrize(
    "backend",
    [
        "llguidance",
        *(pytest.param(name, marks=pytest.mark.slow) for name in BACKENDS if name != "llguidance"),
    ],
    indirect=True,
)
def test_json_object_is_an_object(backend: Backend, vocabulary: Vocabulary) -> None:
    texts = outputs(compiled(backend, "json_object", ""), vocabulary, 8)
    assert texts
    for text in texts:
        assert isinstance(json.loads(text), dict)


def test_whitespace_pattern(backend: Backend, vocabulary: Vocabulary) -> None:
    schema = json.dumps(SCHEMAS["verdict"])
    none = outputs(compiled(backend, "json", schema, ""), vocabulary, 6)
    assert none and not any(" " in text for text in none)
    some = outputs(compiled(backend, "json", schema, r"\n  "), vocabulary, 6)
    assert some and all("\n  " in text for text in some)
    for text in none + some:
        jsonschema.validate(json.loads(text), SCHEMAS["verdict"])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a"),
        ("regex", "a{3,1}"),
        ("grammar", "start: nowhere"),
        ("json", '{"type": "poem"}'),
        ("json", '{"$ref": "#/$defs/none"}'),
        ("json", '{"$ref": "https://example.com/schema.json"}'),
        ("json", "false"),
        ("json", '{"type": "object", "properties": []}'),
    ],
)
def test_nonsense_is_refused(backend: Backend, kind: str, text: str) -> None:
    # Whatever a backend raises is the guide's fault: the compiling process turns it into a refusal.
    with pytest.raises(Exception):  # noqa: B017
        compiled(backend, kind, text)


def test_a_matcher_refuses_other_tokens_and_its_copy_is_apart(
    backend: Backend, vocabulary: Vocabulary
) -> None:
    matcher = compiled(backend, "regex", "ab[cd]").matcher()
    ids = vocabulary.ids
    matcher.advance(ids[b"a"])
    other = matcher.copy()
    matcher.advance(ids[b"b"])
    matcher.advance(ids[b"c"])
    other.advance(ids[b"b"])
    other.advance(ids[b"d"])
    with pytest.raises(GrammarError):
        matcher.copy().advance(ids[b"x"])


def test_many_masks_at_once_are_those_made_one_by_one(backend: Backend, vocabulary: Vocabulary) -> None:
    """Also of an output that is over, and of one whose matcher has failed; ``accepts`` never says more."""
    grammar = compiled(backend, "regex", "[a-c]{2}|x")
    ids = [vocabulary.ids[text] for text in (b"a", b"b", b"x", b"d")]
    seen: list[list[int]] = [[], [ids[0]], [ids[0], ids[1]], [ids[2]], [], [ids[1]]]
    matchers = [grammar.matcher() for _ in seen]
    for matcher, tokens in zip(matchers, seen, strict=True):
        for token in tokens:
            matcher.advance(token)
    with pytest.raises(GrammarError):
        matchers[4].advance(ids[3])
    words = np.full((len(seen), -(-len(vocabulary.tokens) // 32)), 7, dtype=np.uint32)
    found = type(matchers[0]).fill_all(matchers, words)
    for i, matcher in enumerate(matchers):
        alone = np.full_like(words[i], 9)
        try:
            may_end = matcher.fill(alone)
        except GrammarError as error:
            assert isinstance(found[i], GrammarError) and str(found[i]) == str(error)
            assert not matcher.accepts(ids[0])
            continue
        assert found[i] is may_end
        assert (words[i] == alone).all()
        for token in ids:
            allowed = bool(alone[token >> 5] >> np.uint32(token & 31) & np.uint32(1))
            assert matcher.accepts(token) in ({allowed} if backend.name == "llguidance" else {False})


def test_recursive_schema_without_end_is_refused(backend: Backend) -> None:
    if backend.name == "llguidance":
        pytest.skip("it writes such values for ever; max_tokens ends them")
    endless = {
        "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}},
        "$ref": "#/$defs/a",
    }
    with pytest.raises(GrammarError):
        compiled(backend, "json", json.dumps(endless))


def test_tokens_spell_what_the_tokenizer_decodes(tokenizer, vocabulary: Vocabulary) -> None:
    for text in ("Hello, world! 12345\n\tx", "äöü 日本語 😀 naïve", '{"a": [1, 2.5e-3, null]}'):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert spell(ids, vocabulary) == text == tokenizer.decode(ids)
    assert not any(vocabulary.tokens[each] for each in tokenizer.all_special_ids)
    assert spell(vocabulary.encode("naïve 日本".encode()), vocabulary) == "naïve 日本"


def test_tokens_of_a_tokenizer_with_byte_fallback(gemma3_path: Path) -> None:
    tokenizer = load_tokenizer(str(gemma3_path), mode="auto", trust_remote_code=False, revision=None)
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    for text in ("Hello,  world!\n", "äöü 日本語 😀 \u2603\U0001f9ff"):
        ids = tokenizer.encode("a" + text, add_special_tokens=False)
        assert spell(ids, vocabulary) == "a" + text
    assert vocabulary.tokens[tokenizer.convert_tokens_to_ids("<end_of_turn>")] == b""
