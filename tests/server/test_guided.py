"""What bodies ask of the form of their output, as the engine is told."""

from __future__ import annotations

from typing import Any

import pytest

from aserve.errors import InvalidRequestError
from aserve.messages.params import GuidedParams
from aserve.server.openai.protocol import CompletionBody

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def guided(**values: Any) -> GuidedParams | None:
    body = CompletionBody.model_validate({"model": "m", "prompt": "p", **values})
    body.check(vocab_size=10, max_num_seqs=4)
    return body.sampling_params().guided


def test_every_form() -> None:
    schema = {"name": "n", "schema": SCHEMA, "strict": True, "description": "d"}
    found = {
        "nothing": guided(),
        "text": guided(response_format={"type": "text"}),
        "object": guided(response_format={"type": "json_object"}),
        "schema": guided(response_format={"type": "json_schema", "json_schema": schema}),
        "lax": guided(response_format={"type": "json_schema", "json_schema": {**schema, "strict": False}}),
        "no schema": guided(response_format={"type": "json_schema", "json_schema": {"name": "n"}}),
        "json": guided(guided_json=SCHEMA, guided_whitespace_pattern=" "),
        "json text": guided(guided_json='{"type": "integer"}', guided_regex=None),
        "regex": guided(guided_regex="a+", guided_decoding_backend="outlines"),
        "choice": guided(guided_choice=["a", "b"], response_format={"type": "text"}),
        "grammar": guided(guided_grammar='start: "a"'),
    }
    assert found == {
        "nothing": None,
        "text": None,
        "object": GuidedParams(json_object=True),
        "schema": GuidedParams(json=SCHEMA),
        "lax": GuidedParams(json=SCHEMA),
        "no schema": GuidedParams(json_object=True),
        "json": GuidedParams(json=SCHEMA, whitespace_pattern=" "),
        "json text": GuidedParams(json='{"type": "integer"}'),
        "regex": GuidedParams(regex="a+", backend="outlines"),
        "choice": GuidedParams(choice=["a", "b"]),
        "grammar": GuidedParams(grammar='start: "a"'),
    }
    assert found["schema"] is not None and found["schema"].param == "response_format"
    assert found["regex"] is not None and found["regex"].param == "guided_regex"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_regex": ["a"]}, "guided_regex"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"response_format": {"type": "poem"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_json": SCHEMA, "use_beam_search": True, "best_of": 2, "temperature": 0}, "guided_json"),
    ],
)
def test_refusals_name_the_field(values: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        guided(**values)
    assert caught.value.param == param
