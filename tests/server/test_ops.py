"""Health, version, metrics, models, the token endpoints, and the start of the engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import aserve
from aserve.errors import ConfigError
from tests.server.conftest import make_app, until
from tests.server.fake_engine import FakeEngine

BODY = {"model": "fake", "prompt": "x", "max_tokens": 2}


async def status(client: Any, path: str) -> int:
    return (await client.get(path)).status_code


async def health(client: Any) -> list[int]:
    return [await status(client, path) for path in ("/health", "/health/ready", "/health/live")]


async def test_health_over_the_engines_life(engine: FakeEngine) -> None:
    engine.loading.clear()
    app = make_app(engine)
    async with app.test_app():
        client = app.test_client()
        # Loading: alive, not ready, and nothing fails that can wait.
        assert await health(client) == [
            503,
            503,
            200,
        ]
        assert await (await client.get("/metrics")).get_data() == b""
        waiting = asyncio.create_task(client.post("/v1/completions", json=BODY))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        engine.loading.set()
        assert (await waiting).status_code == 200
        # Ready.
        answer = await client.get("/health")
        assert (answer.status_code, await answer.get_data()) == (200, b"")
        assert [await status(client, p) for p in ("/health/ready", "/health/live")] == [200, 200]
        # Draining.
        app.extensions["aserve"].refuse_new("going away")
        assert await health(client) == [
            503,
            503,
            200,
        ]
        answer = await client.post("/v1/completions", json=BODY)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "1"
        assert (await answer.get_json())["message"] == "going away"
        # Stalled: there is work and it does not get on; a queue alone, however long, is no such thing.
        app.extensions["aserve"].draining = None
        engine.stalled = 119.0
        assert await health(client) == [200, 200, 200]
        engine.stalled = 121.0
        assert await health(client) == [503, 503, 503]
        # Dead.
        engine.die("the loop has ended")
        assert await health(client) == [500, 503, 503]
    assert engine.stopped


async def test_a_dead_engine_fails_what_runs_and_what_comes(client: Any, engine: FakeEngine) -> None:
    engine.gate.clear()
    waiting = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: engine.num_unfinished == 1)
    engine.die("the loop has ended")
    assert (await waiting).status_code == 500
    assert (await client.post("/v1/completions", json=BODY)).status_code == 500


async def test_a_load_that_fails(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    engine.loading.clear()
    engine.load_error = ConfigError("no weights in /models/x")
    fatal: list[bool] = []
    app = make_app(engine, on_fatal=lambda: fatal.append(True))
    async with app.test_app():
        client = app.test_client()
        waiting = asyncio.create_task(client.post("/v1/completions", json=BODY))
        await asyncio.sleep(0.01)
        engine.loading.set()
        assert (await waiting).status_code == 500
        assert await status(client, "/health/live") == 503
    assert fatal == [True]
    lines = [r for r in caplog.records if "could not be loaded" in r.getMessage()]
    assert lines[0].getMessage() == "the model could not be loaded: no weights in /models/x"
    assert lines[0].exc_info is None


async def test_stopping_while_loading(engine: FakeEngine) -> None:
    engine.loading.clear()
    async with make_app(engine).test_app():
        pass
    assert engine.stopped


async def test_version(client: Any) -> None:
    answer = await client.get("/version")
    assert await answer.get_json() == {"version": aserve.__version__}


async def test_metrics(client: Any, engine: FakeEngine) -> None:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"fake 1" in await answer.get_data()
    engine.stats = None
    answer = await client.get("/metrics")
    assert (answer.status_code, await answer.get_data()) == (200, b"")


async def test_refused_requests_are_counted(engine: FakeEngine) -> None:
    stats = engine.stats
    assert stats is not None
    engine.loading.clear()
    async with make_app(engine, api_key=["k"], max_body_size=1024).test_app() as running:
        client = running.app.test_client()
        assert await status(client, "/health/ready") == 503
        engine.loading.set()
        await until(lambda: running.app.extensions["aserve"].loaded)
        key = {"Authorization": "Bearer k"}
        assert (await client.post("/v1/completions", json=BODY)).status_code == 401
        too_large = {**BODY, "prompt": "x" * 2000}
        for body, wanted in ((too_large, 413), ({"model": "fake"}, 400), (BODY, 200)):
            answer = await client.post("/v1/completions", json=body, headers=key)
            assert answer.status_code == wanted
        assert (await client.get("/nowhere", headers=key)).status_code == 404
        engine.die("over")
        assert await status(client, "/health") == 500
        assert stats.errors == [401, 413, 400, 404]


async def test_the_chat_page(client: Any) -> None:
    answer = await client.get("/")
    assert answer.status_code == 200
    assert answer.mimetype == "text/html"
    assert b"<html" in await answer.get_data()
    assert (await client.get("/static/index.html")).status_code == 200
    for path in ("/static/../app.py", "/static/nothing.js", "/static/"):
        assert await status(client, path) == 404


async def test_models(client: Any) -> None:
    answer = await (await client.get("/v1/models")).get_json()
    assert answer["object"] == "list"
    assert [card["id"] for card in answer["data"]] == ["fake", "alias"]
    card = answer["data"][1]
    assert isinstance(card.pop("created"), int)
    (permission,) = card.pop("permission")
    assert card == {
        "id": "alias",
        "object": "model",
        "owned_by": "aserve",
        "root": "fake",
        "parent": None,
        "max_model_len": 4096,
    }
    assert permission["object"] == "model_permission"
    one = await (await client.get("/v1/models/alias")).get_json()
    assert (one["id"], one["root"]) == ("alias", "fake")
    assert await status(client, "/v1/models/nope") == 404


async def test_any_served_name_is_answered_by_the_first(client: Any) -> None:
    answer = await client.post("/v1/completions", json={**BODY, "model": "alias"})
    assert (await answer.get_json())["model"] == "fake"


async def post(client: Any, path: str, **body: Any) -> Any:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, await answer.get_data()
    return await answer.get_json()


async def test_tokenize(client: Any) -> None:
    answer = await post(client, "/tokenize", model="fake", prompt="ab")
    assert answer == {"count": 3, "max_model_len": 4096, "tokens": [1, 97, 98]}
    answer = await post(client, "/tokenize", prompt="ab", add_special_tokens=False)
    assert answer["tokens"] == [97, 98]
    messages = [{"role": "user", "content": "x"}]
    answer = await post(client, "/tokenize", model="fake", messages=messages)
    assert bytes(answer["tokens"]) == b"<user>x<assistant>"
    answer = await post(client, "/tokenize", messages=messages, add_generation_prompt=False)
    assert bytes(answer["tokens"]) == b"<user>x"


async def test_detokenize(client: Any) -> None:
    assert await post(client, "/detokenize", model="fake", tokens=[97, 98]) == {"prompt": "ab"}
    assert await post(client, "/detokenize", tokens=[]) == {"prompt": ""}


BAD: list[tuple[str, dict[str, Any], int]] = [
    ("/tokenize", {"model": "nope", "prompt": "x"}, 404),
    ("/tokenize", {"model": "fake"}, 400),
    ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400),
    ("/detokenize", {"model": "nope", "tokens": [1]}, 404),
    ("/detokenize", {"model": "fake"}, 400),
    ("/detokenize", {"tokens": [256]}, 400),
    ("/detokenize", {"tokens": [-1]}, 400),
    ("/detokenize", {"tokens": ["1"]}, 400),
]


@pytest.mark.parametrize(("path", "body", "code"), BAD)
async def test_bad_token_requests(client: Any, path: str, body: dict[str, Any], code: int) -> None:
    assert (await client.post(path, json=body)).status_code == code


async def test_the_clients_id_is_in_the_log(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="aserve")
    headers = {"X-Request-Id": "theirs-1"}
    answer = await (await client.post("/v1/completions", json=BODY, headers=headers)).get_json()
    assert f"{answer['id']} has X-Request-Id theirs-1" in caplog.messages


async def test_token_strings(client: Any) -> None:
    answer = await post(client, "/tokenize", prompt="ab", add_special_tokens=False, return_token_strs=True)
    assert answer["token_strs"] == ["a", "b"]


async def test_long_lists_of_tokens(client: Any) -> None:
    assert await post(client, "/detokenize", tokens=[97] * 5000) == {"prompt": "a" * 5000}
    answer = await client.post("/detokenize", json={"tokens": [97] * ((1 << 17) + 1)})
    assert answer.status_code == 400


async def test_tokenizer_info(client: Any) -> None:
    answer = await client.get("/tokenizer_info")
    assert answer.status_code == 200
    info = await answer.get_json()
    assert info["tokenizer_class"] == "FakeTokenizer"
    assert info["chat_template"] == "built in"
    assert (info["eos_token"], info["eos_token_id"], info["bos_token"]) == ("</s>", 0, None)
    assert (info["vocab_size"], info["model_max_length"]) == (256, 4096)
