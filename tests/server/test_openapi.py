"""The document describes every route, and bodies that it allows are bodies that are taken."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest

from aserve.server.openapi import BODIES
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
    assert "security" in document["paths"]["/v1/models"]["get"]
    assert "security" not in document["paths"]["/health"]["get"]


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
