"""Every class of incident has its tests, and those of them that fit nowhere else."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import socket
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import aserve
from tests.containment.rows import ROWS
from tests.server.conftest import post, raw, until
from tests.server.fake_engine import FakeEngine

TESTS = Path(__file__).parents[1]
SOURCES = sorted(Path(aserve.__file__).parent.rglob("*.py"))


@cache
def collected(path: str) -> frozenset[str]:
    """Names that pytest finds in a file: functions, and classes or cases of a state machine."""
    tree = ast.parse((TESTS / path).read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.add(node.targets[0].id)
    return frozenset(name for name in found if name.startswith(("test_", "Test")))


def test_no_row_is_missing() -> None:
    assert list(ROWS) == [f"R{i}" for i in range(1, 24)] + [f"S{i}" for i in range(1, 23)]


@pytest.mark.parametrize("name", ROWS)
def test_every_test_of_a_row_is_collected(name: str) -> None:
    row = ROWS[name]
    assert row.tests
    for each in row.tests:
        path, _, function = each.partition("::")
        assert Path(path).name.startswith("test_")
        assert function in collected(path), each


IDS = ["", "a", "same", "same", "x" * 16_000, "../../etc", "\x1b[31m", "0", "*"]


async def test_r21_ids_of_clients_are_for_the_log_alone(
    port: int, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """R21, S21: whatever they are, also those of requests that run, nobody is mixed up with anybody."""
    caplog.set_level(logging.INFO)
    engine.gate.clear()
    body = {"model": "fake", "prompt": "x", "max_tokens": 2, "request_id": "same", "user": "a\r\nb"}
    asked = [
        asyncio.create_task(
            raw(port, post("/v1/completions", body, f"X-Request-Id: {each}", "Connection: close"))
        )
        for each in IDS
    ]
    done = asyncio.gather(*asked)
    await until(lambda: len(engine.submitted) + sum(task.done() for task in asked) == len(IDS))
    ours = {request.id for request in engine.submitted}
    assert len(ours) == len(engine.submitted) >= len(IDS) - 2
    assert not any(each and each in id for id in ours for each in ("same", "etc", "xxxx"))
    engine.gate.set()
    for given, answer in zip(IDS, await done, strict=True):
        assert answer.split(b" ")[1] == b"200" or given == "\x1b[31m" or len(given) > 1000, answer[:200]
    assert not any("\x1b" in record.getMessage() or "\r" in record.getMessage() for record in caplog.records)


def test_s4_nothing_is_unpickled_but_from_our_own_pipe() -> None:
    dangerous = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    pipes = {"guided/process.py", "guided/child.py", "server/bodies.py", "server/body_child.py"}
    for path in SOURCES:
        name = path.relative_to(SOURCES[0].parent).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found = [node.module.partition(".")[0]]
            assert name in pipes or not dangerous.intersection(found), name


def test_s6_no_check_is_an_assert() -> None:
    """Python -O removes them."""
    for path in SOURCES:
        nodes = ast.walk(ast.parse(path.read_text()))
        assert not any(isinstance(node, ast.Assert) for node in nodes), path


MEDIA: list[tuple[str, dict[str, Any]]] = [
    ("images", {"type": "image_url", "image_url": {"url": url}})
    for url in (
        "http://127.0.0.1/", "http://[::1]/", "http://0x7f.1/", "http://169.254.169.254/latest/meta-data",
        "http://ok\\@evil/", "file:///etc/passwd", "gopher://127.0.0.1/", "data:image/png;base64,AAAA",
    )
] + [
    ("audio", {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}),
    ("videos", {"type": "video_url", "video_url": {"url": "http://127.0.0.1/"}}),
    ("files", {"type": "file", "file": {"file_id": "x"}}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MEDIA)))
async def test_s11_media_are_refused_and_nothing_is_fetched(
    port: int, engine: FakeEngine, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One 400 that names the part, from every route that takes a conversation."""
    what, part = MEDIA[number]
    content = [{"type": "text", "text": "look"}, part]
    chat = {"model": "fake", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
    kinds = {"image_url": "input_image", "file": "input_file"}
    own = {**part, "type": kinds.get(part["type"], part["type"])}
    response = {"model": "fake", "input": [{"role": "user", "content": [own]}]}
    looked_up: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: looked_up.append(args))
    for path, body, place in (
        ("/v1/chat/completions", chat, "messages.0.content.1"),
        ("/v1/messages", chat, "messages.0.content.1"),
        ("/v1/responses", response, "input.0.content.0"),
    ):
        answer = await raw(port, post(path, body, "Connection: close"))
        assert answer.split(b" ")[1] == b"400", answer
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert place in error["message"], error
        if path != "/v1/messages":
            assert f"{what} are not supported" in error["message"], error
    assert engine.submitted == [] and looked_up == []


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "fake\x00", "%2e%2e/fake", "fake/../fake", "m" * 10_000]
)
async def test_s20_names_of_models_are_no_paths(port: int, engine: FakeEngine, name: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/embeddings"):
        body = {"model": name, "prompt": "x", "input": "x", "messages": [{"role": "user", "content": "x"}]}
        if path != "/v1/chat/completions":
            del body["messages"]
        answer = await raw(port, post(path, body, "Connection: close"))
        assert answer.split(b" ")[1] in (b"400", b"404"), answer
        assert b"root:" not in answer and len(answer) < 4000
    assert engine.submitted == []
