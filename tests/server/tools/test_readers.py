"""Calls in every format: the same for any split of the text, JSON as soon as complete, never an exception."""

from __future__ import annotations

import ast
import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aserve import registry
from aserve.server.openai.pieces import CallArguments, CallStart, Piece, Text
from aserve.server.openai.tools import parsers
from aserve.server.openai.tools.answer import message_of
from aserve.server.openai.tools.forced import ListReader, NamedReader
from aserve.server.openai.tools.json_text import MAX_DEPTH
from aserve.server.openai.tools.reader import CallReader, Context, merged

FORMATS = list(registry.tool_parsers)
ALL = [*FORMATS, "list", "named"]
Calls = list[tuple[str, dict[str, Any]]]


def reader(kind: str, **values: Any) -> CallReader:
    numbers = itertools.count()
    context = Context({"f", "get_weather"}, lambda: f"id{next(numbers)}", **values)
    if kind == "named":
        return NamedReader(context, "f")
    return ListReader(context) if kind == "list" else parsers.load(kind)(context)


def read(kind: str, parts: list[str], **values: Any) -> list[Piece]:
    made = reader(kind, **values)
    found: list[Piece] = []
    for part in parts:
        found += made.feed(part, False)
    return merged(found + made.feed("", True))


def split(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def calls_of(pieces: list[Piece]) -> Calls:
    message = message_of(pieces)
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Text))


# ---------------------------------------------------------------- what models write

GOLDEN: list[tuple[str, str, str, Calls]] = [
    # format, text, what of it is text, the calls
    ("hermes", "hello world", "hello world", []),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", {"a": 1})]),
    (
        "hermes",
        'Let me see.\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": '
        '{"city": "Köln \\"x\\" \\u00e9\\n"}}\n</tool_call>\n',
        "Let me see.",
        [("f", {}), ("get_weather", {"city": 'Köln "x" é\n'})],
    ),
    ("hermes", '<tool_call>{"name": "unknown"}</tool_call> and more', " and more", [("unknown", {})]),
    ("hermes", '<tool_call>{"arguments": {"a": [1]}, "name": "f"}</tool_call>', "", [("f", {"a": [1]})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 2}"}</tool_call>', "", [("f", {"a": 2})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", {})]),
    # What models get wrong, and is plain enough.
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1,],},}</tool_call>', "", [("f", {"a": [1]})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny\\d"}}', "", [("f", {"a": "x\ny\\d"})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": True}}', "", [("f", {"a": True})]),
    # Marks inside of arguments are arguments.
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
        "",
        [("f", {"a": "</tool_call>"})],
    ),
    # What is no call is text.
    ("hermes", "a < b <tool <tool_call", "a < b <tool <tool_call", []),
    ("hermes", "</tool_call>", "</tool_call>", []),
    ("hermes", "<tool_call>soon</tool_call>", "<tool_call>soon</tool_call>", []),
    ("hermes", "<tool_call>{'name': 'f'}", "<tool_call>{'name': 'f'}", []),
    ("hermes", '<tool_call>{"name": "f", "arguments": 1}', '<tool_call>{"name": "f", "arguments": 1}', []),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}', '<tool_call>{"name": "", "arguments": {}}', []),
    ("hermes", '<tool_call>no <tool_call>{"name": "f"}', "<tool_call>no", [("f", {})]),
    ("llama3-json", '{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
    ("llama3-json", ' {"type": "function", "name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
    (
        "llama3-json",
        '{"name": "f", "parameters": {}}; {"name": "get_weather", "arguments": {"x": null}}',
        "",
        [("f", {}), ("get_weather", {"x": None})],
    ),
    ("llama3-json", '<|python_tag|>{"name": "other", "parameters": {}}', "", [("other", {})]),
    ("llama3-json", 'Well <|python_tag|>{"name": "f"}', "Well", [("f", {})]),
    ("llama3-json", '{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
    ("llama3-json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3-json", 'See {"name": "f", "parameters": {}}', 'See {"name": "f", "parameters": {}}', []),
    ("llama3-json", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("llama3-json", "<|python", "<|python", []),
    ("llama3-json", '{"name": "f"} done', " done", [("f", {})]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "", [("f", {"a": 1})]),
    (
        "mistral",
        'ok[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "x"}, {"name": "get_weather"}]',
        "ok",
        [("f", {"a": 1}), ("get_weather", {})],
    ),
    ("mistral", '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g{}', "", [("f", {"a": 1}), ("g", {})]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}', "", [("f", {"a": 1})]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{"a": 1}', "", [("f", {"a": 1})]),
    ("mistral", '[TOOL_CALLS]{"name": "f"}', "", [("f", {})]),
    ("mistral", "[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
    ("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", []),
    ("mistral", "[TOOL] [x]", "[TOOL] [x]", []),
    ("mistral", '[TOOL_CALLS] [{"name": "f"}] then', " then", [("f", {})]),
    ("mistral", '[TOOL_CALLS] [{"name": "f"}, 5]', ", 5]", [("f", {})]),
    ("pythonic", '[get_weather(city="Köln", days=2)]', "", [("get_weather", {"city": "Köln", "days": 2})]),
    ("pythonic", "[f(), f(a=None, b=[True, (1,)],)]", "", [("f", {}), ("f", {"a": None, "b": [True, [1]]})]),
    ("pythonic", "[f(a=-2.5, b=.5, c=1_0.)]", "", [("f", {"a": -2.5, "b": 0.5, "c": 10.0})]),
    ("pythonic", "[f(a={'x': {\"y\": 'it\\'s'}})]", "", [("f", {"a": {"x": {"y": "it's"}}})]),
    ("pythonic", "<|python_start|>[g(a=1)]<|python_end|>", "", [("g", {"a": 1})]),
    ("pythonic", "<|tool_call_start|>[g(a=1)]<|tool_call_end|>Now", "Now", [("g", {"a": 1})]),
    ("pythonic", '<|tool_call_start|>[{"name": "g"}]<|tool_call_end|>', "", [("g", {})]),
    ("pythonic", "<|python_start|>g(a=1)<|python_end|>", "", [("g", {"a": 1})]),
    ("pythonic", "[1] says so", "[1] says so", []),
    ("pythonic", "[unknown(a=1)]", "[unknown(a=1)]", []),
    ("pythonic", "[f(1)]", "[f(1)]", []),
    ("pythonic", "see [f(a=1)]", "see [f(a=1)]", []),
    ("pythonic", "<|python_end|>", "<|python_end|>", []),
    ("list", '[{"name": "f", "arguments": {"a": 1}}]', "", [("f", {"a": 1})]),
    ("list", '\n[ {"name":"f"} ,{"name":"f","arguments":{"b":[]}} ]\n', "", [("f", {}), ("f", {"b": []})]),
    ("list", "sorry", "sorry", []),
    ("list", "[]", "[]", []),
    ("named", ' {"a": {"b": "c"}}', "", [("f", {"a": {"b": "c"}})]),
    ("named", "{}", "", [("f", {})]),
    ("named", "sorry", "sorry", []),
]  # fmt: skip
IDS = [f"{kind}-{number}" for number, (kind, *_) in enumerate(GOLDEN)]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("kind", "text", "content", "calls"), GOLDEN, ids=IDS)
def test_what_models_write(kind: str, text: str, content: str, calls: Calls, whole: bool) -> None:
    made = reader(kind, whole=whole)
    pieces = made.feed(text, True)
    assert (text_of(pieces), calls_of(pieces)) == (content, calls)
    assert made.finish_reason("stop") == ("tool_calls" if calls else "stop")
    assert made.finish_reason("length") == "length"
    assert read(kind, list(text), whole=whole) == pieces
    for place in range(len(text)):
        assert read(kind, [text[:place], text[place:]], whole=whole) == pieces


@pytest.mark.parametrize(("kind", "text", "content", "calls"), GOLDEN, ids=IDS)
def test_r23_cut_at_any_place(kind: str, text: str, content: str, calls: Calls) -> None:
    """R23: a text that a length limit cuts is told as far as it goes, whole or in pieces."""
    for place in range(len(text)):
        made = reader(kind)
        pieces = made.feed(text[:place], True)
        assert read(kind, list(text[:place])) == pieces
        whole = message_of(read(kind, [text[:place]], whole=True)).get("tool_calls", [])
        told = message_of(pieces).get("tool_calls", [])
        assert told == whole
        assert made.finish_reason("length") == "length"
        complete = [json.loads(call["function"]["arguments"]) for call in told[:-1]]
        assert complete == [arguments for _, arguments in calls[: len(complete)]]
        if told and made.finish_reason("stop") == "stop":  # the last one is cut
            with pytest.raises(ValueError):
                json.loads(told[-1]["function"]["arguments"])


# ---------------------------------------------------------------- any call there is

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(["</tool_call>", "<tool_call>", "[TOOL_CALLS]", ")]", "}]", "😀"])
    | st.sampled_from(["\\", '"', "'", "'''", "\n\t\0"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
KEYWORDS = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
CALLS = st.lists(
    st.tuples(st.sampled_from(["f", "get_weather"]), st.dictionaries(KEYWORDS, VALUES, max_size=4)),
    min_size=1,
    max_size=3,
)
STYLES: list[dict[str, Any]] = [{}, {"indent": 2}, {"ensure_ascii": False, "separators": (",", ":")}]


def hermes(calls: Calls, style: dict[str, Any]) -> str:
    objects = [json.dumps({"name": name, "arguments": arguments}, **style) for name, arguments in calls]
    return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects)


def llama3(calls: Calls, style: dict[str, Any]) -> str:
    return "; ".join(json.dumps({"name": name, "parameters": given}, **style) for name, given in calls)


def mistral(calls: Calls, style: dict[str, Any]) -> str:
    if style.get("indent"):
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(given, **style)}" for name, given in calls)
    return "[TOOL_CALLS]" + array(calls, style)


def pythonic(calls: Calls, style: dict[str, Any]) -> str:
    show = repr if not style else lambda value: json.dumps(value, **style)
    shown = (f"{name}({', '.join(f'{k}={show(v)}' for k, v in given.items())})" for name, given in calls)
    return f"[{', '.join(shown)}]"


def array(calls: Calls, style: dict[str, Any]) -> str:
    return json.dumps([{"name": name, "arguments": given} for name, given in calls], **style)


WRITERS: dict[str, Callable[[Calls, dict[str, Any]], str]] = {
    "hermes": hermes,
    "llama3-json": llama3,
    "mistral": mistral,
    "pythonic": pythonic,
    "list": array,
}


@pytest.mark.parametrize("kind", list(WRITERS))
@settings(max_examples=60, deadline=None)
@given(calls=CALLS, style=st.sampled_from(STYLES), places=st.lists(st.integers(0, 10_000), max_size=12))
def test_any_calls_survive_any_split(
    kind: str, calls: Calls, style: dict[str, Any], places: list[int]
) -> None:
    text = WRITERS[kind](calls, style)
    pieces = read(kind, split(text, places))
    assert calls_of(pieces) == [(name, _by_text_keys(arguments)) for name, arguments in calls]
    assert text_of(pieces) == ""
    assert read(kind, [text], whole=True) == pieces
    assert read(kind, list(text)) == pieces


def _by_text_keys(value: Any) -> Any:
    return json.loads(json.dumps(value))


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *("<|python_start|>", "<|python_end|>", '{"name": "f", ', '"arguments": ', '"parameters": ', '{"a": 1}'),
    *(
        "f(",
        "a=",
        '"',
        "'",
        "'''",
        "\\",
        "\\u12",
        "\\ud800",
        "\n",
        "\x00",
        "tru",
        "true",
        "1e",
        "0.5",
        "null",
    ),
    *("name", "NaN", "None", "é", "😀", *"{}[]),;: -<x"),
]


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.sampled_from(FRAGMENTS), max_size=14),
    places=st.lists(st.integers(0, 500), max_size=6),
    parallel=st.booleans(),
)
@example(["<tool_call>", '{"name": "f", ', '"arguments": ', "{", '"', "\\ud800", '"', ":", "tru"], [3], True)
def test_nonsense_is_never_an_error(kind: str, parts: list[str], places: list[int], parallel: bool) -> None:
    text = "".join(parts)
    for whole in (False, True):
        pieces = read(kind, [text], whole=whole, parallel=parallel)
        assert read(kind, split(text, places), whole=whole, parallel=parallel) == pieces
        assert read(kind, list(text), whole=whole, parallel=parallel) == pieces
        made = reader(kind, whole=whole, parallel=parallel)
        message = message_of(made.feed(text, True))
        json.dumps(message, ensure_ascii=False).encode()
        if made.finish_reason("stop") == "tool_calls":
            for call in message["tool_calls"]:
                assert isinstance(json.loads(call["function"]["arguments"]), dict)
    if not any(isinstance(piece, CallStart) for piece in pieces) and parallel:
        assert text_of(pieces) == text


@settings(max_examples=300, deadline=None)
@given(st.text("ab0123456789.eE+-_'\"\\xuUnrt()[]{}:, \nTrueFalsN", max_size=24))
@example("'\\x41\\u00e9\\U0001F600\\'\\\n'")
@example("-1_000.5e+3")
@example("('a', {1: 'b', 'c': ()},)")
@example("(0)")
@example("((1, 2), [(3,)], ())")
def test_literals_are_pythons(text: str) -> None:
    """Whatever is read as a call has the arguments that Python gives it."""
    source = f"[f(a={text})]"
    pieces = read("pythonic", [source], whole=True)
    try:
        call = ast.parse(source, mode="eval").body.elts[0]  # type: ignore[attr-defined]
        wanted = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        json.dumps(wanted)
    except Exception:
        return
    if text_of(pieces):  # sets, bytes, complex numbers, joined strings and hexadecimal are not taken
        return
    assert calls_of(pieces) == [("f", _by_text_keys(wanted))]


# ---------------------------------------------------------------- in time


@pytest.mark.parametrize("kind", FORMATS)
def test_text_is_not_held_back(kind: str) -> None:
    made = reader(kind)
    for character in "Thesum:a<b|c[d]e{f}":
        pieces = made.feed(character, False)
        if character not in "<[":
            assert text_of(pieces)[-1:] == character
    assert text_of(made.feed("x", False)) == "x"


@pytest.mark.parametrize(
    ("kind", "lead"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": '),
        ("llama3-json", '{"name": "f", "parameters": '),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": '),
        ("mistral", "[TOOL_CALLS]f"),
        ("pythonic", "[f(x="),
        ("list", '[{"name": "f", "arguments": '),
        ("named", ""),
    ],
)
def test_arguments_are_told_at_once(kind: str, lead: str) -> None:
    made = reader(kind)
    pieces = made.feed(lead + '{"key": "some', False)
    told = "".join(piece.text for piece in pieces if isinstance(piece, CallArguments))
    assert [piece.name for piece in pieces if isinstance(piece, CallStart)] == ["f"]
    assert told.endswith('{"key":"some')
    for character in " text, [and {more":
        assert made.feed(character, False) == [CallArguments(character)]


def test_a_json_answer_is_told_once_it_is_no_call() -> None:
    made = reader("llama3-json")
    assert made.feed('{"name": "o', False) == []
    assert text_of(made.feed('ther"', False)) == '{"name": "other"'
    made = reader("llama3-json")
    assert text_of(made.feed('{"answer"', False)) == '{"answer"'


def test_only_one_call_if_they_may_not_be_parallel() -> None:
    text = hermes([("f", {"a": 1}), ("f", {"a": 2}), ("f", {"a": 3})], {})
    for whole in (True, False):
        assert calls_of(read("hermes", [text], parallel=False, whole=whole)) == [("f", {"a": 1})]


def test_a_broken_call_is_text_or_ends_where_it_broke() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": !}}</tool_call>'
    assert read("hermes", [text], whole=True) == [Text(text)]
    made = reader("hermes")
    pieces = made.feed(text, True)
    assert pieces[1:] == [CallArguments('{"a":'), Text("!}}</tool_call>")]
    assert made.finish_reason("stop") == "stop"


def test_nesting_has_a_limit() -> None:
    deep = (
        '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}}</tool_call>"
    )
    assert read("hermes", [deep], whole=True) == [Text(deep)]


LONG: list[tuple[str, str, str]] = [
    ("hermes", "", "<"),
    ("hermes", "", " "),
    ("hermes", "", "<tool_call>"),
    ("hermes", "<tool_call>", " "),
    ("hermes", '<tool_call>{"name": "f", "arguments": ', "["),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "', "x"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ', "1"),
    ("hermes", '<tool_call>{"name": "f", "arguments": "', "\\n"),
    ("hermes", '<tool_call>{"name": "', "x"),
    ("hermes", '<tool_call>{"arguments": {"a": "', "x"),
    ("llama3-json", '{"', "x"),
    ("llama3-json", '{"name": "f"}', ";"),
    ("llama3-json", "", " "),
    ("mistral", "[TOOL_CALLS]", "x"),
    ("mistral", '[TOOL_CALLS] [{"name": "f"}', ","),
    ("mistral", "", "[TOOL_CALLS] ["),
    ("pythonic", "", "["),
    ("pythonic", "[f(a='", "'"),
    ("pythonic", "[f(a='''", "'"),
    ("pythonic", "[f(a=", "["),
    ("list", "[", " "),
    ("named", '{"a":', " "),
]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("kind", "lead", "unit"), LONG)
def test_work_grows_with_the_text(kind: str, lead: str, unit: str, whole: bool) -> None:
    """Counted in calls of Python functions, of which a text twice as long needs about twice as many."""

    def work(length: int) -> int:
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += 1

        made = reader(kind, whole=whole)
        text = lead + unit * (length // len(unit))
        sys.setprofile(count)
        try:
            for character in text:
                made.feed(character, False)
            made.feed("", True)
        finally:
            sys.setprofile(None)
        return calls

    assert work(1600) < 2.5 * work(800)
