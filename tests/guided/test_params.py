"""GuidedParams: what is accepted, what is refused, and the field an error names."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from aserve.errors import InvalidRequestError
from aserve.messages.params import GuidedParams, SamplingParams


def test_kind_and_text_of_each_guide() -> None:
    found = [
        (each.kind, each.text)
        for each in (
            GuidedParams(json={"type": "object", "title": "ü"}),
            GuidedParams(json='{"type": "integer"}'),
            GuidedParams(regex="[a-z]+"),
            GuidedParams(choice=["yes", "no"]),
            GuidedParams(grammar='start: "x"'),
            GuidedParams(json_object=True),
        )
    ]
    assert found == [
        ("json", '{"type": "object", "title": "ü"}'),
        ("json", '{"type": "integer"}'),
        ("regex", "[a-z]+"),
        ("choice", '["yes", "no"]'),
        ("grammar", 'start: "x"'),
        ("json_object", ""),
    ]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({}, "guided"),
        ({"json": {}, "regex": "a"}, "guided_regex"),
        ({"json": {}, "json_object": True}, "guided_json_object"),
        ({"json": 3}, "guided_json"),
        ({"json": ["x"]}, "guided_json"),
        ({"json": " "}, "guided_json"),
        ({"json": {"x": object()}}, "guided_json"),
        ({"json": {"x": float("nan")}}, "guided_json"),
        ({"json": '"\ud800"'}, "guided_json"),
        ({"regex": ""}, "guided_regex"),
        ({"regex": b"a"}, "guided_regex"),
        ({"choice": []}, "guided_choice"),
        ({"choice": "yes"}, "guided_choice"),
        ({"choice": ["yes", ""]}, "guided_choice"),
        ({"choice": ["yes", 1]}, "guided_choice"),
        ({"grammar": {}}, "guided_grammar"),
        ({"json_object": 1}, "guided_json_object"),
        ({"json": {}, "backend": 1}, "guided_decoding_backend"),
        ({"json": {}, "whitespace_pattern": 1}, "guided_whitespace_pattern"),
        ({"regex": "a", "whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"json": 3, "source": "response_format"}, "response_format"),
    ],
)
def test_misuse_is_refused_by_name(options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        GuidedParams(**options)
    assert caught.value.param == param


def test_a_schema_nested_too_deep_for_the_interpreter_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(InvalidRequestError) as caught:
        GuidedParams(json=schema)
    assert caught.value.param == "guided_json"
    while schema:  # taken apart here: freeing it at once would recurse as deep
        schema = schema.pop("items")


def test_later_changes_of_a_schema_do_not_reach_the_guide() -> None:
    schema = {"type": "string"}
    guided = GuidedParams(json=schema)
    schema["type"] = "null"
    assert guided.text == '{"type": "string"}'


def test_sampling_params_carry_it() -> None:
    params = SamplingParams(guided=GuidedParams(regex="a|b"))
    assert params.clone().guided == params.guided
    assert "guided=GuidedParams(" in repr(params) and "'a|b'" in repr(params)
    assert pickle.loads(pickle.dumps(params)).guided.kind == "regex"
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(guided={"regex": "a"})  # type: ignore[arg-type]
    assert caught.value.param == "guided"


def test_not_with_beam_search() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(use_beam_search=True, best_of=2, temperature=0.0, guided=GuidedParams(choice=["a"]))
    assert caught.value.param == "guided_choice"
