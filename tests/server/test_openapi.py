"""The document describes every route, and bodies that it allows are bodies that are taken."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from aserve.server.openapi import BODIES
from aserve.server.openapi import document as document_of
from aserve.server.openapi_answers import ANSWERS, OTHER_MEDIA
from aserve.server.openapi_fields import EXAMPLES as EXAMPLE_FIELDS
from tests.server.conftest import make_app
from tests.server.fake_engine import FakeEngine
from tests.server.test_hostile_bodies import BODIES as EXAMPLES


@pytest.fixture
async def document(client: Any) -> dict[str, Any]:
    answer = await client.get("/openapi.json")
    assert answer.status_code == 200
    found: dict[str, Any] = await answer.get_json()
    return found


async def test_every_route_is_in_it(app: Any, document: dict[str, Any]) -> None:
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        assert path in document["paths"]
        for method in rule.methods & {"DELETE", "GET", "POST"}:
            operation = document["paths"][path][method.lower()]
            assert operation["summary"]
            assert ("requestBody" in operation) == (method == "POST"), path
    posts = {rule.rule for rule in app.url_map.iter_rules() if "POST" in rule.methods}
    assert posts == set(BODIES)


@pytest.mark.parametrize("values", [{}, {"api_key": ["the-key"]}])
async def test_it_says_where_a_key_is_needed(engine: FakeEngine, values: dict[str, Any]) -> None:
    async with make_app(engine, **values).test_app() as app:
        headers = {"Authorization": "Bearer the-key"}
        document = await (await app.test_client().get("/openapi.json", headers=headers)).get_json()
    secured = {
        path for path, methods in document["paths"].items() if "security" in next(iter(methods.values()))
    }
    always = {"/admin/requests", "/admin/requests/{request_id}"}
    if not values:
        assert secured == always
    else:
        open_to_all = {"/", "/health", "/health/live", "/health/ready", "/static/{name}"}
        assert secured == document["paths"].keys() - open_to_all


async def test_it_names_the_models(document: dict[str, Any]) -> None:
    for path in BODIES:
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        body = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        shown = body["properties"]["model"]
        assert {"type": "string", "enum": ["fake", "alias"]} in shown.get("anyOf", [shown])


def test_every_answer_with_json_is_described(app: Any) -> None:
    paths = {re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule) for rule in app.url_map.iter_rules()}
    silent = {"/health", "/health/live", "/health/ready"}
    assert paths == ANSWERS.keys() | OTHER_MEDIA.keys() | silent
    for schema in ANSWERS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", EXAMPLES)
async def test_answers_are_as_described(client: Any, document: dict[str, Any], path: str) -> None:
    body = {**EXAMPLES[path], "stream": False, "stream_options": None}
    answer = await client.post(path, json=body)
    assert answer.status_code == 200
    jsonschema.Draft202012Validator(ANSWERS[path]).validate(await answer.get_json())
    answer = await client.post(path, json={**body, "model": "nobody"})
    assert answer.status_code == 404
    name = "MessagesError" if "messages" in path else "Error"
    jsonschema.Draft202012Validator(document["components"]["schemas"][name]).validate(await answer.get_json())


async def test_embeddings_of_either_form_are_as_described(client: Any) -> None:
    for form in ("float", "base64"):
        body = {"model": "fake", "input": "x", "encoding_format": form}
        answer = await client.post("/v1/embeddings", json=body)
        jsonschema.Draft202012Validator(ANSWERS["/v1/embeddings"]).validate(await answer.get_json())


async def test_references_resolve(document: dict[str, Any]) -> None:
    found = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert found == set(document["components"]["schemas"])
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", EXAMPLES)
async def test_it_allows_what_is_taken(document: dict[str, Any], path: str) -> None:
    operation = document["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
    validator.validate(EXAMPLES[path])
    nulls = dict.fromkeys(BODIES[path].model_fields)
    validator.validate({**nulls, **EXAMPLES[path]})
    for wrong in ([], {**EXAMPLES[path], "model": 3}):
        assert not validator.is_valid(wrong)


def validator_of(document: dict[str, Any], path: str) -> jsonschema.Draft202012Validator:
    content = document["paths"][path]["post"]["requestBody"]["content"]
    schema = {**content["application/json"]["schema"], "components": document["components"]}
    return jsonschema.Draft202012Validator(schema)


def test_bounds_are_in_the_words_of_json_schema(app: Any) -> None:
    text = json.dumps(document_of(app))
    assert '"minimum"' in text
    assert not re.findall(r'"(?:ge|gt|le|lt)":', text)


SAMPLED = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/responses/input_tokens"]
OUTSIDE: list[tuple[str, Any, Any]] = [
    ("temperature", 0, -0.1),
    ("top_p", 1e-9, 0),
    ("top_p", 1, 1.01),
    ("top_k", -1, 0),
    ("top_k", 1, -2),
    ("min_p", 0, -0.01),
    ("presence_penalty", -2, -2.01),
    ("frequency_penalty", 2, 2.01),
    ("repetition_penalty", 1e-9, 0),
    ("min_tokens", 0, -1),
    ("priority", 2**31 - 1, 2**31),
    ("timeout", 30, 0),
    ("seed", 2**63 - 1, 2**63),
]
"""A field, a value at its edge, and one beyond."""


@pytest.mark.parametrize("path", SAMPLED)
async def test_it_knows_the_ranges(client: Any, document: dict[str, Any], path: str) -> None:
    """What is out of range is out of the document too, also where an answer does not depend on it."""
    validator = validator_of(document, path)
    plain = {"model": "fake", "prompt" if path == "/v1/completions" else "input": "x"}
    if "chat" in path:
        plain = {"model": "fake", "messages": [{"role": "user", "content": "x"}]}
    for field, inside, outside in OUTSIDE:
        validator.validate({**plain, field: inside})
        assert (await client.post(path, json={**plain, field: inside})).status_code == 200, field
        assert not validator.is_valid({**plain, field: outside}), field
        answer = await client.post(path, json={**plain, field: outside})
        assert answer.status_code == 400, field
        assert (await answer.get_json())["error"]["param"] == field


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [{"role": "user", "content": "x"}]},
        {"guided_choice": [""]},
        {"guided_regex": ""},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {" 5": 1}},
        {"logit_bias": {"1_0": 1}},
        {"modalities": ["audio"]},
        {"response_format": {"type": "json_schema"}},
        {"functions": [{"name": "f"}]},
        {"chat_template": "{{ messages }}"},
        {"max_tokens": 0},
        {"max_completion_tokens": 0},
    ],
    ids=str,
)
async def test_what_a_chat_refuses_is_not_in_it(
    client: Any, document: dict[str, Any], values: dict[str, Any]
) -> None:
    path = "/v1/chat/completions"
    body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], **values}
    wanted = 200 if "messages" in values else 400
    assert validator_of(document, path).is_valid(body) == (wanted == 200)
    assert (await client.post(path, json=body)).status_code == wanted


def test_examples_are_allowed(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    found = [(name, field) for name, fields in EXAMPLE_FIELDS.items() for field in fields]
    assert found
    for name, field in found:
        schema = {**schemas[name]["properties"][field], "components": document["components"]}
        for example in schema["examples"]:
            jsonschema.Draft202012Validator(schema).validate(example)
