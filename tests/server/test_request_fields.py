"""Every field of today's clients: read, refused by name, or accepted without effect; never a surprise."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import openai
import pytest

from aserve.server.openai.completions import CompletionBody
from aserve.server.openai.embeddings import EmbeddingBody
from aserve.server.openai.protocol import Body, ChatBody, unknown_fields
from tests.server.conftest import make_app
from tests.server.fake_engine import TEXT, FakeEngine

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
PLAIN = {"model": "fake", "messages": HELLO, "max_tokens": 4}
TRANSPORT = {"extra_headers", "extra_query", "extra_body"}
CLIENT = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("create", "kind"),
    [
        (CLIENT.chat.completions.create, ChatBody),
        (CLIENT.completions.create, CompletionBody),
        (CLIENT.embeddings.create, EmbeddingBody),
    ],
)
def test_every_parameter_of_the_client_is_known(create: Any, kind: type[Body]) -> None:
    parameters = set(inspect.signature(create).parameters) - TRANSPORT
    assert parameters - set(kind.model_fields) == set()


WITHOUT_EFFECT: dict[str, Any] = {
    "metadata": {"run": "7"},
    "store": True,
    "service_tier": "flex",
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "the quick"},
    "modalities": ["text"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"ttl": "30m"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "someone",
    "verbosity": "low",
    "user": "someone",
    "stream_options": None,
    "functions": [],
    "function_call": None,
    "web_search_options": None,
    "moderation": None,
}


async def test_fields_without_effect(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(engine, strict_fields=True)
    async with app.test_app():
        client = app.test_client()
        with caplog.at_level(logging.INFO, "aserve"):
            answer = await client.post(CHAT, json={**PLAIN, **WITHOUT_EFFECT})
            assert answer.status_code == 200, await answer.get_data()
            plain = await client.post(CHAT, json=PLAIN)
        assert "ignored" not in caplog.text
        found, wanted = await answer.get_json(), await plain.get_json()
        assert found["choices"] == wanted["choices"]
        assert engine.submitted[0].params == engine.submitted[1].params


REFUSED: list[tuple[str, Any, str]] = [
    ("functions", [{"name": "f"}], "use tools"),
    ("web_search_options", {"search_context_size": "low"}, "not supported"),
    ("moderation", {"model": "m"}, "not supported"),
    ("chat_template", "{{ messages }}", "--chat-template"),
    ("modalities", ["text", "audio"], "text"),
    ("reasoning_effort", "x" * 33, "32"),
    ("messages", [], "at least 1"),
    ("messages", HELLO * 4097, "4096"),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1025}], "1024"),
    ("documents", [{}] * 257, "256"),
    ("chat_template_kwargs", {str(i): i for i in range(65)}, "64"),
    ("chat_template_kwargs", {"tokenize": True}, "may not set"),
    ("stream_options", {"include_usage": True}, "stream"),
]


@pytest.mark.parametrize(("name", "value", "says"), REFUSED, ids=lambda value: str(value)[:24])
async def test_refused_by_name(client: Any, engine: FakeEngine, name: str, value: Any, says: str) -> None:
    answer = await client.post(CHAT, json={**PLAIN, name: value})
    assert answer.status_code == 400
    error = (await answer.get_json())["error"]
    assert says in error["message"]
    assert error["param"] == name
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("path", "kind", "required"),
    [
        (CHAT, ChatBody, {"model": "fake", "messages": HELLO}),
        ("/v1/completions", CompletionBody, {"model": "fake", "prompt": "hello"}),
        ("/v1/embeddings", EmbeddingBody, {"model": "fake", "input": "hello"}),
    ],
)
async def test_null_is_not_given(
    client: Any, engine: FakeEngine, path: str, kind: type[Body], required: dict[str, Any]
) -> None:
    engine.model_config.max_model_len = 40  # a chat without max_tokens fills the context
    answer = await client.post(path, json={**dict.fromkeys(kind.model_fields), **required})
    assert answer.status_code == 200, await answer.get_data()
    answer = await client.post(path, json=required)
    assert answer.status_code == 200
    first, second = engine.submitted
    assert (first.params, first.options, first.ids) == (second.params, second.options, second.ids)


async def test_nulls_inside(client: Any) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}], "name": None}]
    assistant = [{"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "audio": None}]
    options = {"include_usage": None, "continuous_usage_stats": None, "include_obfuscation": None}
    answer = await client.post(
        CHAT, json={**PLAIN, "messages": parts + assistant, "stream": True, "stream_options": options}
    )
    assert answer.status_code == 200, await answer.get_data()


async def test_unknown_fields_are_named_once(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    body = {**PLAIN, "grammar_of_doom": 1, "stream": True, "stream_options": {"chunk_size": 3}}
    with caplog.at_level(logging.INFO, "aserve"):
        for _ in range(2):
            assert (await client.post(CHAT, json=body)).status_code == 200
    lines = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert lines == ["request fields ignored: grammar_of_doom, stream_options.chunk_size"]


async def test_a_field_under_another_name_in_the_code_is_known(engine: FakeEngine) -> None:
    schema = {"name": "visit", "description": "x", "strict": True, "schema": {"type": "object"}}
    format = {"type": "json_schema", "json_schema": schema}
    assert unknown_fields(ChatBody, {**PLAIN, "response_format": format}) == set()
    assert unknown_fields(ChatBody, {**PLAIN, "response_format": {**format, "schema_": 1}}) == {
        "response_format.schema_"
    }
    async with make_app(engine, strict_fields=True).test_app() as app:
        answer = await app.test_client().post(CHAT, json={**PLAIN, "response_format": format})
    assert answer.status_code == 200


async def test_strict_fields(engine: FakeEngine) -> None:
    app = make_app(engine, strict_fields=True)
    async with app.test_app():
        client = app.test_client()
        for extra, param in [
            ({"grammar_of_doom": None}, "grammar_of_doom"),
            ({"stream": True, "stream_options": {"chunk_size": 3}}, "stream_options.chunk_size"),
        ]:
            answer = await client.post(CHAT, json={**PLAIN, **extra})
            assert answer.status_code == 400
            error = (await answer.get_json())["error"]
            assert "extra_forbidden" in error["message"] and error["param"] == param
        assert engine.submitted == []
        # What a message holds is the template's.
        message = {"role": "user", "content": "x", "reasoning_content": "y"}
        answer = await client.post(CHAT, json={**PLAIN, "messages": [message]})
        assert answer.status_code == 200


def test_unknown_fields_by_hand() -> None:
    values = {"model": 1, "a": 2, "stream_options": {"b": 1}, "response_format": "not an object"}
    assert unknown_fields(ChatBody, values) == {"a", "stream_options.b"}


async def test_max_completion_tokens_wins(client: Any) -> None:
    for values, length in [
        ({"max_completion_tokens": 3}, 3),
        ({"max_tokens": 5, "max_completion_tokens": 3}, 3),
        ({"max_tokens": 5, "max_completion_tokens": None}, 5),
    ]:
        answer = await client.post(CHAT, json={"model": "fake", "messages": HELLO, **values})
        choice = (await answer.get_json())["choices"][0]
        assert choice["message"]["content"] == TEXT[:length]


async def test_variables_for_the_template(client: Any, engine: FakeEngine) -> None:
    documents = [{"title": "t", "text": "x"}]
    for values, wanted in [
        ({}, {}),
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True, "x": 1}},
            {"reasoning_effort": "none", "enable_thinking": True, "x": 1},
        ),
        ({"documents": documents}, {"documents": documents}),
    ]:
        answer = await client.post(CHAT, json={**PLAIN, **values})
        assert answer.status_code == 200, await answer.get_data()
        assert engine.tokenizer.variables == {"documents": None, **wanted}


async def test_the_developer_is_the_system(client: Any, engine: FakeEngine) -> None:
    messages = [{"role": "developer", "content": "be brief"}, *HELLO]
    await client.post(CHAT, json={**PLAIN, "messages": messages})
    assert bytes(engine.submitted[0].ids) == b"<system>be brief<user>hello<assistant>"


async def test_parts(client: Any, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        *HELLO,
    ]
    await client.post(CHAT, json={**PLAIN, "messages": messages})
    assert bytes(engine.submitted[0].ids) == b"<user>one\ntwo<assistant>no<user>hello<assistant>"
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, {"type": 3}, {}):
        answer = await client.post(CHAT, json={**PLAIN, "messages": [{"role": "user", "content": [part]}]})
        assert answer.status_code == 400
        assert "messages.0.content" in (await answer.get_json())["error"]["message"]


async def test_the_last_message_is_gone_on_with(client: Any, engine: FakeEngine) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well, "}]
    answer = await client.post(CHAT, json={**PLAIN, "messages": begun, "continue_final_message": True})
    assert answer.status_code == 200, await answer.get_data()
    message = (await answer.get_json())["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", TEXT[:4])
    assert bytes(engine.submitted[0].ids) == b"<user>hello<assistant>Well, "
    assert engine.tokenizer.variables["continue_final_message"] is True
    answer = await client.post(CHAT, json={**PLAIN, "continue_final_message": True})
    assert answer.status_code == 400
    assert (await answer.get_json())["error"]["param"] == "continue_final_message"
