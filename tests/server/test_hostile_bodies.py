"""Whatever a body holds, the answer is a result or a 4xx in the API's shape: never a 5xx."""

from __future__ import annotations

import logging
from typing import Any

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis import HealthCheck, given, settings

from tests.server.conftest import make_app
from tests.server.fake_engine import FakeEngine

HELLO = [{"role": "user", "content": "hello"}]
PART = [{"type": "text", "text": "x"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "fake",
        "prompt": "x",
        "max_tokens": 2,
        "logit_bias": {"5": 1},
        "stop": ["@"],
    },
    "/v1/chat/completions": {
        "model": "fake",
        "messages": [{"role": "user", "content": PART}],
        "max_tokens": 2,
        "stream_options": {"include_usage": True},
        "stream": True,
        "chat_template_kwargs": {"x": 1},
        "logprobs": True,
        "top_logprobs": 2,
    },
    "/v1/embeddings": {"model": "fake", "input": ["x", "y"], "dimensions": 3, "encoding_format": "base64"},
    "/v1/responses": {
        "model": "fake",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "x"},
        ],
        "max_output_tokens": 2,
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "tool_choice": "none",
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "reasoning": {"effort": "low"},
        "include": ["message.output_text.logprobs"],
        "metadata": {"a": "b"},
    },
    "/v1/messages": {
        "model": "fake",
        "messages": [
            {"role": "user", "content": PART},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": PART}]},
        ],
        "max_tokens": 2,
        "system": PART,
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "none"},
        "thinking": {"type": "disabled"},
        "output_config": {"effort": "low"},
        "stop_sequences": ["@"],
    },
    "/v1/messages/count_tokens": {"model": "fake", "messages": HELLO, "system": "x"},
    "/tokenize": {"model": "fake", "prompt": "x", "add_special_tokens": True},
    "/detokenize": {"model": "fake", "tokens": [1, 2]},
}

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70).filter(lambda value: -(2**63) <= value < 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["type", "text", "fake", "auto", "none", "required", "json_schema", "user", ""])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to everything inside ``value``."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, each in inner:
        found += places(each, (*path, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    copy = orjson.loads(orjson.dumps(value))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return copy


@pytest.mark.parametrize("path", BODIES)
async def test_bodies_with_something_else_in_one_place(path: str, caplog: pytest.LogCaptureFixture) -> None:
    import asyncio

    caplog.set_level(logging.CRITICAL)
    body = BODIES[path]
    engine = FakeEngine(max_model_len=200)
    app = make_app(engine)
    loop = asyncio.get_running_loop()
    async with app.test_app():
        client = app.test_client()
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, await answer.get_data()

        async def post(value: Any) -> None:
            answer = await client.post(path, data=orjson.dumps(value))
            data = await answer.get_data()
            assert answer.status_code < 500, data
            if answer.status_code >= 400:
                assert orjson.loads(data)["error"]["message"], data
            else:
                assert b"the server failed" not in data

        @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.sampled_from(places(body)), VALUES)
        def attack(place: tuple[Any, ...], value: Any) -> None:
            asyncio.run_coroutine_threadsafe(post(replaced(body, place, value)), loop).result()

        await asyncio.to_thread(attack)
    assert not engine.num_unfinished
