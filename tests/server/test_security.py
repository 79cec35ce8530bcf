from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from quart import Quart, Request, Response

from aserve.errors import ConfigError
from aserve.server.keys import KeyRing
from aserve.server.security import load_middleware
from tests.server.conftest import make_app, post, raw, running, until
from tests.server.fake_engine import FakeEngine

KEYS = ["first-key", "clé-two"]

OPEN = {"/health", "/health/live", "/health/ready", "/", "/static/<path:name>"}
KEYED = {
    "/v1/models",
    "/v1/models/<path:name>",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/responses/input_tokens",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/openapi.json",
    "/version",
    "/metrics",
    "/admin/requests",
    "/admin/requests/<request_id>",
}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_every_route_has_an_auth_decision(engine: FakeEngine) -> None:
    """A new route fails here until it is put into one of the two sets above."""
    app = make_app(engine, api_key=KEYS)
    async with app.test_app():
        client = app.test_client()
        rules = {rule.rule: rule for rule in app.url_map.iter_rules()}
        assert set(rules) == OPEN | KEYED
        for path, rule in rules.items():
            concrete = path.replace("<path:name>", "index.html").replace("<request_id>", "x")
            for method in sorted((rule.methods or set()) - {"OPTIONS"}):
                answer = await client.open(concrete, method=method)
                assert (answer.status_code == 401) == (path in KEYED), (method, path)


async def test_keys(engine: FakeEngine) -> None:
    app = make_app(engine, api_key=KEYS)
    async with app.test_app():
        client = app.test_client()
        for key in KEYS:
            answer = await client.get("/v1/models", headers=bearer(key))
            assert answer.status_code == 200, key
        wrong: list[dict[str, str]] = [
            {},
            bearer(""),
            bearer("first-ke"),
            bearer("first-key2"),
            bearer("FIRST-KEY"),
            {"Authorization": "first-key"},
            {"Authorization": "Basic first-key"},
            {"Authorization": "Bearer"},
            {"X-Api-Key": "first-key"},
            {"X-Api-Key": "first-key", "Authorization": "Bearer wrong"},
        ]
        for headers in wrong:
            answer = await client.get("/v1/models", headers=headers)
            assert answer.status_code == 401, headers
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            body = await answer.get_json()
            assert body["error"]["type"] == "AuthenticationError"
            assert body["code"] == 401
        assert (await client.get("/v1/nothing")).status_code == 401
        assert (await client.get("/v1/nothing", headers=bearer("first-key"))).status_code == 404
        assert (await client.get("/v1/completions")).status_code == 401  # would be 405


async def test_without_a_key_everything_is_open(client: Any) -> None:
    assert (await client.get("/v1/models")).status_code == 200
    assert (await client.get("/v1/models", headers=bearer("anything"))).status_code == 200


def test_keys_are_compared_as_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    ring = KeyRing(["one", "two", "three"])
    assert ring.find(["Bearer one"]) is not None
    assert len(compared) == 3  # the rest is compared after a match too
    assert {len(side) for pair in compared for side in pair} == {32}
    assert ring.find(["Bearer one", "Bearer two"]) is None


TARGETS = [
    "/v1/models", "//v1/models", "/v1//models", "///v1///models", "http://h/v1/models", "http://h//v1/models",
    "http://h:1/v1/models/", "/v1/models/", "/v1%2Fmodels", "/%76%31/models", "/%2Fv1/models", "/v1/%6dodels",
    "/v1/models?x=/health", "/v1/models#/health", "/health/../v1/models", "/x/../v1/models", "/./v1/models",
    "/health%2F..%2Fv1/models", "/V1/models", "/v1/models;x", "/v1/models%00", "/v1/models%20", "/v1/fake",
    "http://[/v1/models", "*", "v1/models", "/static/../v1/models", "/static/%2e%2e/app.py",
    "/static/..%2fapp.py", "/%2e%2e/v1/models", "//health/v1/models", "/v1/models/fake",
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
async def test_no_path_gets_round_the_key(serving: Any, target: str) -> None:
    port = await serving(api_key=KEYS)
    ask = f"GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
    answer = await raw(port, ask + "\r\n")
    status = int(answer.split(b" ", 2)[1])
    assert status in (400, 401, 404), answer
    assert b"object" not in answer or b'"error"' in answer
    assert b"import" not in answer
    # With the key the friendly forms are served: what was refused above was not merely unknown.
    answer = await raw(port, ask + "Authorization: Bearer first-key\r\n\r\n")
    assert answer.split(b" ", 2)[1] in (b"200", b"400", b"404"), answer


@pytest.mark.parametrize(
    "target", ["//v1/models", "/v1//models", "http://h/v1/models", "/v1/models/", "/v1%2Fmodels"]
)
async def test_friendly_forms_of_a_path_are_served(serving: Any, target: str) -> None:
    port = await serving(api_key=KEYS)
    answer = await raw(
        port,
        f"GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nAuthorization: Bearer first-key\r\n\r\n",
    )
    assert answer.startswith(b"HTTP/1.1 200"), answer


async def test_header_tricks(serving: Any) -> None:
    port = await serving(api_key=KEYS)
    for lines in (
        "Host: a/?x", "Host: h\r\nX-HTTP-Method-Override: OPTIONS", "Host: h\r\nX-Original-URL: /health",
        "Host: h\r\nX-Forwarded-Prefix: /health",
        "Host: h\r\nAuthorization: Bearer x\r\nAuthorization: Bearer first-key",
    ):  # fmt: skip
        answer = await raw(port, f"GET /v1/models HTTP/1.1\r\n{lines}\r\nConnection: close\r\n\r\n")
        assert answer.split(b" ", 2)[1] in (b"400", b"401"), (lines, answer)


async def test_options_needs_no_key_and_does_nothing(engine: FakeEngine) -> None:
    app = make_app(engine, api_key=KEYS)
    async with app.test_app():
        answer = await app.test_client().options("/v1/completions")
        assert answer.status_code == 200
        assert await answer.get_data() == b""
        assert not engine.submitted


async def test_a_target_without_a_path_is_the_page(serving: Any) -> None:
    port = await serving(api_key=KEYS)
    answer = await raw(port, "GET ?x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"text/html" in answer


# ---------------------------------------------------------------- root path


async def test_root_path(serving: Any) -> None:
    port = await serving(root_path="/llm", api_key=KEYS)
    for path, known in (
        ("/llm/v1/models", True), ("/v1/models", True), ("//llm//v1/models", True),
        ("/llmv1/models", False), ("/llm/llm/v1/models", False),
    ):  # fmt: skip
        head = f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
        assert (await raw(port, head + "\r\n")).startswith(b"HTTP/1.1 401"), path
        answer = await raw(port, head + "Authorization: Bearer first-key\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200" if known else b"HTTP/1.1 404"), path
    answer = await raw(port, "GET /llm/health HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


# ---------------------------------------------------------------- CORS

PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "Authorization, Content-Type",
}


def cors(answer: Any) -> dict[str, str]:
    return {
        name.title().removeprefix("Access-Control-"): value
        for name, value in answer.headers.items()
        if name.title().startswith("Access-Control-")
    }


async def test_cors_by_default(engine: FakeEngine) -> None:
    app = make_app(engine, api_key=KEYS)
    async with app.test_app():
        client = app.test_client()
        answer = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert answer.status_code == 200
        found = cors(answer)
        assert found["Allow-Origin"] == "*"
        assert "POST" in found["Allow-Methods"]
        assert found["Allow-Headers"] == "authorization, content-type"
        assert "Allow-Credentials" not in found
        # A page must be able to read why it was refused.
        answer = await client.get("/v1/models", headers={"Origin": "https://page.example"})
        assert answer.status_code == 401
        assert cors(answer) == {"Allow-Origin": "*"}
        assert cors(await client.get("/health")) == {}


async def test_cors_restricted(engine: FakeEngine) -> None:
    app = make_app(
        engine,
        allowed_origins=["https://page.example"],
        allowed_methods=["POST"],
        allowed_headers=["Content-Type", "authorization"],
        allow_credentials=True,
    )
    async with app.test_app():
        client = app.test_client()
        answer = await client.options("/tokenize", headers=PREFLIGHT)
        assert answer.status_code == 200
        assert cors(answer)["Allow-Origin"] == "https://page.example"
        assert cors(answer)["Allow-Methods"] == "POST"
        assert cors(answer)["Allow-Credentials"] == "true"
        for name, value in (
            ("Origin", "https://other.example"),
            ("Access-Control-Request-Method", "DELETE"),
            ("Access-Control-Request-Headers", "X-Other"),
        ):
            answer = await client.options("/tokenize", headers={**PREFLIGHT, name: value})
            assert answer.status_code == 400, name
        answer = await client.get("/version", headers={"Origin": "https://other.example"})
        assert answer.status_code == 200
        assert cors(answer) == {}
        answer = await client.get("/version", headers={"Origin": "https://page.example"})
        assert cors(answer) == {"Allow-Origin": "https://page.example", "Allow-Credentials": "true"}
        assert answer.headers["Vary"] == "Origin"


async def test_cors_headers_are_on_streams(client: Any) -> None:
    body = {"model": "fake", "prompt": "x", "stream": True}
    answer = await client.post("/v1/completions", json=body, headers={"Origin": "https://page.example"})
    assert cors(answer) == {"Allow-Origin": "*"}
    assert answer.headers["X-Request-Id"]


# ---------------------------------------------------------------- middleware


class Stamp:
    """An ASGI middleware that adds a header."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def stamped(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-stamp", b"asgi")]}
            await send(message)

        await self.app(scope, receive, stamped)


async def teapot(request: Request, call_next: Any) -> Any:
    if request.headers.get("X-Teapot"):
        return "short and stout", 418
    response: Response = await call_next(request)
    response.headers["X-Order"] = response.headers.get("X-Order", "") + "a"
    return response


async def second(request: Request, call_next: Any) -> Any:
    response: Response = await call_next(request)
    response.headers["X-Order"] = response.headers.get("X-Order", "") + "b"
    return response


async def failing(request: Request, call_next: Any) -> Any:
    raise ZeroDivisionError


def not_a_coroutine(request: Request, call_next: Any) -> Any:
    return None


HERE = "tests.server.test_security."


def with_middleware(engine: FakeEngine, *names: str) -> Quart:
    return make_app(engine, middleware=[HERE + name for name in names])


async def test_middleware(engine: FakeEngine) -> None:
    app = with_middleware(engine, "Stamp", "teapot", "second")
    async with app.test_app():
        client = app.test_client()
        answer = await client.get("/version")
        assert answer.status_code == 200
        assert answer.headers["X-Stamp"] == "asgi"
        assert answer.headers["X-Order"] == "ab"  # the last named is outermost
        answer = await client.get("/v1/nothing")
        assert answer.status_code == 404
        assert answer.headers["X-Order"] == "ab"  # it sees error answers too
        answer = await client.get("/version", headers={"X-Teapot": "1"})
        assert answer.status_code == 418
        body = {"model": "fake", "prompt": "x", "stream": True}
        answer = await client.post("/v1/completions", json=body)
        assert (await answer.get_data()).endswith(b"data: [DONE]\n\n")
        assert answer.headers["X-Order"] == "ab"


async def test_a_failing_middleware_is_a_500(engine: FakeEngine) -> None:
    app = with_middleware(engine, "failing")
    async with app.test_app():
        answer = await app.test_client().get("/version")
        assert answer.status_code == 500
        assert (await answer.get_json())["type"] == "InternalServerError"


@pytest.mark.parametrize(
    "path", [HERE + "not_a_coroutine", HERE + "HERE", HERE + "missing", "no.such.module.name", ".x"]
)
def test_what_is_no_middleware(path: str) -> None:
    with pytest.raises(ValueError, match="middleware"):
        load_middleware([path])
    with pytest.raises(ConfigError):
        load_middleware([path])


async def test_post_helper_sends_what_a_client_would(serving: Any) -> None:
    port = await serving(api_key=KEYS)
    body = {"model": "fake", "prompt": "x", "max_tokens": 2}
    assert (await raw(port, post("/v1/completions", body, "Connection: close"))).startswith(b"HTTP/1.1 401")
    answer = await raw(
        port, post("/v1/completions", body, "Connection: close", "Authorization: Bearer first-key")
    )
    assert answer.startswith(b"HTTP/1.1 200")


# ---------------------------------------------------------------- key files and the admin scope


def test_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nplain\nalice secret-a\n\nroot secret-r admin  # the boss\n")
    ring = KeyRing(["given"], str(path))
    found = {secret: ring.find([f"Bearer {secret}"]) for secret in ("given", "plain", "secret-a", "secret-r")}
    assert {secret: (key.name, key.admin) for secret, key in found.items() if key is not None} == {
        "given": ("key-1", False),
        "plain": ("line-2", False),
        "secret-a": ("alice", False),
        "secret-r": ("root", True),
    }
    assert ring.find(["Bearer alice"]) is None
    assert ring.find([], ["secret-a"]) == found["secret-a"]
    assert b"secret" not in repr(vars(ring)).encode()


@pytest.mark.parametrize("text", ["", "# nothing\n", "a b c\n", "a b admin d\n"])
def test_a_key_file_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match="api_key_file") as refused:
        KeyRing([], str(path))
    assert refused.value.param == "api_key_file"
    with pytest.raises(ConfigError, match="cannot read"):
        KeyRing([], str(tmp_path / "none"))


async def test_a_hangup_changes_the_keys(
    engine: FakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("alice one-secret\n")
    app = make_app(engine, api_key_file=str(path))
    async with app.test_app():
        client = app.test_client()

        async def accepted(secret: str) -> bool:
            return bool((await client.get("/v1/models", headers=bearer(secret))).status_code == 200)

        assert await accepted("one-secret")
        path.write_text("bob two-secret\n")
        os.kill(os.getpid(), signal.SIGHUP)
        await until_true(lambda: accepted("two-secret"))
        assert not await accepted("one-secret")
        path.write_text("what is this nonsense-secret\n")
        os.kill(os.getpid(), signal.SIGHUP)
        for _ in range(100):
            if "stay as they were" in caplog.text:
                break
            await asyncio.sleep(0.02)
        assert await accepted("two-secret")
    assert "stay as they were: api_key_file: line 1" in caplog.text
    assert "secret" not in caplog.text


async def until_true(holds: Any) -> None:
    async with asyncio.timeout(5):
        while not await holds():  # noqa: ASYNC110 - what is waited for is on the other side
            await asyncio.sleep(0.01)


async def test_the_admin_scope(engine: FakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice user-key\nroot admin-key admin\n")
    app = make_app(engine, api_key_file=str(path))
    async with app.test_app():
        client = app.test_client()
        assert (await client.get("/admin/requests")).status_code == 401
        answer = await client.get("/admin/requests", headers=bearer("user-key"))
        assert answer.status_code == 403
        assert (await answer.get_json())["error"]["type"] == "PermissionDeniedError"
        assert (await client.get("/v1/models", headers=bearer("admin-key"))).status_code == 200
        engine.gate.clear()
        body = {"model": "fake", "prompt": "x", "max_tokens": 3}
        pending = asyncio.create_task(client.post("/v1/completions", json=body, headers=bearer("user-key")))
        await until(lambda: engine.num_unfinished == 1)
        answer = await client.get("/admin/requests", headers=bearer("admin-key"))
        (one,) = (await answer.get_json())["requests"]
        url = f"/admin/requests/{one['id']}"
        assert (await client.delete(url, headers=bearer("user-key"))).status_code == 403
        assert (await client.delete(url, headers=bearer("admin-key"))).status_code == 200
        assert (await pending).status_code == 500
        assert (await client.delete(url, headers=bearer("admin-key"))).status_code == 404


async def test_without_an_admin_key_nobody_is_admin(engine: FakeEngine) -> None:
    for keys, status in ((None, 401), (["some-key"], 403)):
        app = make_app(engine, api_key=keys)
        async with app.test_app():
            answer = await app.test_client().get("/admin/requests", headers=bearer("some-key"))
            assert answer.status_code == status


async def test_nothing_private_is_logged(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    """S21: keys, prompts and addresses of clients are in no line, whatever happens."""
    caplog.set_level("DEBUG")
    app = make_app(engine, api_key=["the-api-key"])
    async with running(app) as port:
        for key, prompt in (("the-api-key", "PRIVATE words"), ("another-key", "PRIVATE"), ("the-api-key", 5)):
            for stream in (False, True):
                body = {"model": "fake", "prompt": prompt, "max_tokens": 2, "stream": stream, "PRIVATE": 1}
                head = (f"Authorization: Bearer {key}", "Connection: close", "X-Request-Id: a\x1bb")
                await raw(port, post("/v1/completions", body, *head))
        engine.fail_after = 1
        engine.failure = ZeroDivisionError("boom")  # type: ignore[assignment]
        await raw(port, post("/v1/completions", {**body, "prompt": "PRIVATE"}, *head))
    text = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("aserve"))
    assert "key-1" in text  # the key's name, not the key
    for secret in ("the-api-key", "another-key", "words", "127.0.0.1", "\x1b"):
        assert secret not in text, secret
