"""Routes are found by their path alone where nothing else matters, and are those that Werkzeug finds."""

from __future__ import annotations

from typing import Any

import pytest
from werkzeug.exceptions import HTTPException

from tests.server.conftest import make_app
from tests.server.fake_engine import FakeEngine

PATHS = ["/", "/v1/models/fake", "/v1/models/", "/v1/Models", "/nothing", "/v1/chat/completions/", "/v1"]
METHODS = ["GET", "HEAD", "POST", "OPTIONS", "DELETE", "get"]


def added() -> Any:
    app: Any = make_app(FakeEngine())

    async def view(**_: Any) -> str:
        return ""

    for number, (rule, options) in enumerate(
        (
            ("/twice", {"methods": ["GET"]}),
            ("/twice", {"methods": ["GET", "POST"]}),
            ("/over/<name>", {}),
            ("/over/it", {}),
            ("/filled", {"defaults": {"name": "a"}}),
            ("/talk", {"websocket": True}),
        )
    ):
        app.add_url_rule(rule, f"added {number}", view, **options)
    return app


def found(context: Any) -> tuple[Any, ...]:
    asked = context.request
    error = asked.routing_exception
    return asked.url_rule, asked.view_args, type(error), getattr(error, "valid_methods", None)


def matched(context: Any) -> tuple[Any, ...]:
    try:
        rule, values = context.url_adapter.match(return_rule=True)
    except HTTPException as error:
        return None, None, type(error), getattr(error, "valid_methods", None)
    return rule, values, type(None), None


@pytest.mark.parametrize("method", METHODS)
async def test_what_is_found_is_what_matches(method: str) -> None:
    app = added()
    paths = {*PATHS, *(rule.rule for rule in app.url_map.iter_rules())}
    found_by_path = 0
    for path in sorted(paths):
        async with app.test_request_context(path, method=method) as context:
            assert found(context) == matched(context), path
            found_by_path += (method, path) in app.plain_routes
    assert found_by_path > 5 or method in ("DELETE", "get")


async def test_the_values_of_one_request_are_not_those_of_the_next() -> None:
    app = added()
    async with app.test_request_context("/twice") as context:
        context.request.view_args["name"] = "mine"
    async with app.test_request_context("/twice") as context:
        assert context.request.view_args == {}
