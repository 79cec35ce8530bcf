"""``aserve run-batch``: order, bad lines, bounded memory, and the whole command on a model."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import orjson
import pytest

from aserve.batch import cli, files, lines
from aserve.batch.lines import BadLine, Line
from aserve.batch.runner import run
from aserve.errors import ConfigError
from aserve.server.cli import main
from tests import tiny_checkpoint
from tests.server.conftest import make_app
from tests.server.fake_engine import TEXT, FakeEngine

CHAT, COMPLETION, EMBEDDING = lines.URLS[:3]


def request(name: str, url: str = COMPLETION, **body: Any) -> dict[str, Any]:
    defaults = {
        COMPLETION: {"prompt": "x", "max_tokens": 4},
        CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4},
        EMBEDDING: {"input": "x"},
    }[url]
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "fake", **defaults, **body}}


def as_file(*values: Any) -> bytes:
    return b"".join((v if isinstance(v, bytes) else orjson.dumps(v)) + b"\n" for v in values)


async def answers(engine: FakeEngine, data: bytes, **options: Any) -> list[dict[str, Any]]:
    app = make_app(engine)
    target = io.BytesIO()
    async with app.test_app():
        options = {"in_flight": 8, **options}
        await run(app, lines.read(io.BytesIO(data), 10_000), target, **options)
    return [orjson.loads(line) for line in target.getvalue().splitlines()]


async def test_every_kind_of_request() -> None:
    found = await answers(FakeEngine(), as_file(request("a"), request("b", CHAT), request("c", EMBEDDING)))
    assert [answer["custom_id"] for answer in found] == ["a", "b", "c"]
    for answer in found:
        assert answer["id"].startswith("batch_req_") and answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["request_id"].startswith("req-")
    bodies = [answer["response"]["body"] for answer in found]
    assert bodies[0]["choices"][0]["text"] == TEXT[:4]
    assert bodies[1]["choices"][0]["message"]["content"] == TEXT[:4]
    assert len(bodies[2]["data"][0]["embedding"]) == 4


async def test_answers_keep_the_order_of_their_lines() -> None:
    engine = FakeEngine()
    engine.tick = 0.001
    found = await answers(engine, as_file(*(request(str(i), max_tokens=30 - i) for i in range(30))))
    assert [answer["custom_id"] for answer in found] == [str(i) for i in range(30)]
    counts = [answer["response"]["body"]["usage"]["completion_tokens"] for answer in found]
    assert counts == [30 - i for i in range(30)]


BAD: list[tuple[Any, str | None, str]] = [
    (b"{", None, "line 2 is not valid JSON"),
    (b"[]", None, "not a JSON object"),
    (b"\xff", None, "not valid JSON"),
    (b'{"custom_id": "' + b"x" * 10_000 + b'"}', None, "more than 10000 bytes"),
    ({"url": COMPLETION, "body": {}}, None, "custom_id"),
    ({"custom_id": "", "url": COMPLETION, "body": {}}, None, "custom_id"),
    ({"custom_id": "b", "url": "/v1/models", "body": {}}, "b", "url must be one of"),
    ({"custom_id": "b", "url": ["x"], "body": {}}, "b", "url must be one of"),
    ({"custom_id": "b", "method": "GET", "url": COMPLETION, "body": {}}, "b", "method"),
    ({"custom_id": "b", "url": COMPLETION, "body": "x"}, "b", "body must be an object"),
    (request("b", stream=True), "b", "not streamed"),
]


@pytest.mark.parametrize(("bad", "name", "says"), BAD, ids=lambda value: str(value)[:30])
async def test_a_bad_line_has_an_error_line(bad: Any, name: str | None, says: str) -> None:
    found = await answers(FakeEngine(), as_file(request("a"), bad, b"  ", request("c")))
    assert [answer["custom_id"] for answer in found] == ["a", name, "c"]
    assert found[1]["response"] is None
    assert found[1]["error"]["code"] == "invalid_line" and says in found[1]["error"]["message"]
    assert found[0]["error"] is None and found[2]["error"] is None


async def test_a_refused_request_tells_why() -> None:
    found = await answers(FakeEngine(), as_file(request("a", top_p=0), request("b", model="nope")))
    first, second = found
    assert first["response"]["status_code"] == 400 and first["response"]["body"]["error"]["param"] == "top_p"
    assert first["error"]["code"] == "BadRequestError" and "top_p" in first["error"]["message"]
    assert second["response"]["status_code"] == 404 and second["error"]["code"] == "NotFoundError"


async def test_a_failure_of_the_engine_is_told_line_by_line() -> None:
    engine = FakeEngine()
    engine.fail_after = 2
    (answer,) = await answers(engine, as_file(request("a")))
    assert answer["response"]["status_code"] == 503 and answer["error"]["message"] == "failed on demand"


async def test_few_lines_are_held_at_a_time() -> None:
    engine = FakeEngine()
    read = written = 0
    most = 0

    def source() -> Iterator[Line | BadLine]:
        nonlocal read, most
        for i in range(200):
            read += 1
            most = max(most, read - written, engine.num_unfinished)
            found = lines.parse(orjson.dumps(request(str(i))), i)
            assert isinstance(found, Line)
            yield found

    def progress() -> None:
        nonlocal written
        written += 1

    app = make_app(engine)
    async with app.test_app():
        totals = await run(app, source(), io.BytesIO(), in_flight=5, progress=progress)
    assert (totals.done, written) == (200, 200)
    assert most <= 6


async def test_a_cancelled_batch_aborts_what_it_started() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    app = make_app(engine)
    async with app.test_app():
        source = lines.read(io.BytesIO(as_file(*(request(str(i)) for i in range(4)))), 10_000)
        task = asyncio.create_task(run(app, source, io.BytesIO(), in_flight=8))
        while engine.num_unfinished < 4:  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(engine.aborted) == 4


@pytest.mark.parametrize(
    ("argv", "param"),
    [
        (["-i", "x.jsonl", "-o", "x.jsonl"], "output_file"),
        (["-i", "x.jsonl", "-o", "./x.jsonl"], "output_file"),
        (["-i", "x", "-o", "y", "--max-in-flight", "0"], "max_in_flight"),
        (["-i", "x", "-o", "y", "--max-line-size", "0"], "max_line_size"),
        (["-i", "x", "-o", "y", "--max-waiting-requests", "3"], "max_waiting_requests"),
    ],
)
def test_arguments_that_cannot_work(argv: list[str], param: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        cli.parse([*argv, "--model", "m"])
    assert caught.value.param == param


def test_required_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse(["-i", "x"])
    assert caught.value.code == 2 and "--output-file is required" in capsys.readouterr().err


def test_a_missing_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.jsonl"
    assert cli.main(["-i", str(tmp_path / "none"), "-o", str(target), "--model", "m"]) == 2
    assert "input_file" in capsys.readouterr().err
    assert not target.exists()


class Store(BaseHTTPRequestHandler):
    """Gives what was put."""

    held: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        data = self.held.get(self.path)
        self.send_response(404 if data is None else 200)
        self.end_headers()
        self.wfile.write(data or b"")

    def do_PUT(self) -> None:
        self.held[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_addresses() -> None:
    with HTTPServer(("127.0.0.1", 0), Store) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/file?key=secret"
            with files.target(url) as target:
                target.write(b"one\ntwo\n")
            assert Store.held == {"/file?key=secret": b"one\ntwo\n"}
            with files.source(url) as source:
                assert source.read() == b"one\ntwo\n"
            with pytest.raises(ConfigError, match="404") as caught, files.source(url + "2"):
                pass
            assert "secret" not in str(caught.value)
        finally:
            server.shutdown()
            thread.join()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_checkpoint.write(tmp_path / "tiny", weights=True)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    common = {"model": "tiny", "temperature": 0}
    source.write_bytes(
        as_file(
            request("chat", CHAT, **common),
            b"not json",
            request("text", **common),
            request("vector", EMBEDDING, model="tiny"),
            request("wrong", model="other"),
        )
    )
    flags = ["--model", str(model), "--served-model-name", "tiny", "--dtype", "float32"]
    assert main(["run-batch", "-i", str(source), "-o", str(target), *flags]) == 1
    assert "3 answered, 1 refused, 1 lines were no requests" in capsys.readouterr().err
    found = [orjson.loads(line) for line in target.read_bytes().splitlines()]
    assert [answer["custom_id"] for answer in found] == ["chat", None, "text", "vector", "wrong"]
    statuses = [answer["response"] and answer["response"]["status_code"] for answer in found]
    assert statuses == [200, None, 200, 200, 404]
    assert found[2]["response"]["body"]["usage"]["completion_tokens"] == 4
    assert len(found[3]["response"]["body"]["data"][0]["embedding"]) == 32
