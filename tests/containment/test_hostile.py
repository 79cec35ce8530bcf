"""What an attacker sends: refused at once with a 4xx, and nobody else notices.

Named after the rows of incidents they answer: R7, R8, R9, R14, S1, S9, S15 to S19.
"""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from typing import Any

import pytest

from aserve.engine.pool import BoundedPool
from aserve.errors import InvalidRequestError, QueueFullError
from aserve.server import pipelining, service
from aserve.server.killable import KillableThreads
from tests.server.conftest import make_app, post, raw, running, until
from tests.server.fake_engine import FakeEngine, FakeTokenizer

BASE: dict[str, Any] = {"model": "fake", "prompt": "x", "max_tokens": 3}

BODIES: list[dict[str, Any]] = [
    {"n": 10**9}, {"n": 2**63}, {"n": 10**60}, {"best_of": 10**9}, {"n": -1}, {"logprobs": 10**6},
    {"max_tokens": 2**63}, {"max_tokens": -5}, {"stop": ["x"] * 10_000}, {"stop": [""]},
    {"stop_token_ids": [-1, 2**40]}, {"stop_token_ids": list(range(100_000))},
    {"logit_bias": {str(i): 1 for i in range(100_000)}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"x": 1}},
    {"logit_bias": {"9" * 5000: 1}}, {"prompt": [1] * 1_000_000}, {"prompt": [[1]] * 100_000},
    {"prompt": ["x"] * 100_000}, {"prompt": [2**70]}, {"prompt": [-1]}, {"prompt": [[[1]]]}, {"prompt": []},
    {"seed": -(2**70)}, {"temperature": 1e400}, {"temperature": -1}, {"top_p": 0}, {"min_tokens": 10**12},
    {"timeout": -1}, {"priority": 2**40}, {"stream_options": {"include_usage": True}},
    {"truncate_prompt_tokens": 0},
]  # fmt: skip

JSON: list[str] = [
    "[" * 10_000, "{" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "nul", "", "[]", "3", '"x"',
    '{"model": "fake", "prompt": "x", "temperature": NaN}', '{"model": "fake", "prompt": "\\ud800"}',
    '{"model": "fake", "prompt": "x", "temperature": Infinity}', '{"model": "fake"' + ' ' * 100_000,
]  # fmt: skip


COMPLETIONS = "POST /v1/completions HTTP/1.1\r\nHost: h\r\n"


def asked(data: str) -> str:
    return f"{COMPLETIONS}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n{data}"


@pytest.mark.parametrize("number", range(len(BODIES)))
async def test_giant_parameters(port: int, engine: FakeEngine, number: int) -> None:
    """R14."""
    answer = await raw(port, asked(json.dumps({**BASE, **BODIES[number]})))
    assert answer.split(b" ", 2)[1] == b"400", answer[:300]
    assert b"Traceback" not in answer and len(answer) < 4000
    assert engine.submitted == []


@pytest.mark.parametrize("number", range(len(JSON)))
async def test_json_that_is_none_or_too_deep(port: int, engine: FakeEngine, number: int) -> None:
    """S9."""
    answer = await raw(port, asked(JSON[number]))
    assert answer.split(b" ", 2)[1] == b"400", answer[:300]
    assert engine.submitted == []


HEADS = [
    ("GET /health HTTP/1.1\r\nHost: h\r\nX: " + "a" * 40_000 + "\r\n\r\n", b"431"),
    ("GET /health HTTP/1.1\r\nHost: h\r\nX: " + "a" * 200_000 + "\r\n\r\n", b"431"),
    ("GET /health HTTP/1.1\r\nHost: h\r\n" + "X: a\r\n" * 1000 + "\r\n", b"431"),
    ("GET /health?" + "a" * 10_000 + " HTTP/1.1\r\nHost: h\r\n\r\n", b"414"),
    ("GET /" + "a" * 200_000 + " HTTP/1.1\r\nHost: h\r\n\r\n", b"431"),
    (COMPLETIONS + "Content-Length: 1000000000\r\n\r\n", b"413"),
    (
        "POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        b"415",
    ),
    # S18: two readings of one request
    (COMPLETIONS + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"400"),
    (COMPLETIONS + "Transfer-Encoding: xchunked\r\n\r\n{}", b"501"),
    (COMPLETIONS + "Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
    ("GET /health HTTP/1.1\r\nHost: h\r\nX : y\r\n\r\n", b"400"),
    ("GET /health HTTP/1.1\r\nHost: h\r\nX: a\x00b\r\n\r\n", b"400"),
    ("GET /health HTTP/1.1\r\n\r\n", b"400"),
    ("GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"400"),
]


@pytest.mark.parametrize("number", range(len(HEADS)))
async def test_heads(port: int, engine: FakeEngine, number: int) -> None:
    """S15, S16, S18, S19: refused, and the connection is not used any further."""
    request, status = HEADS[number]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request.encode("latin-1"))
        answer = await asyncio.wait_for(reader.readline(), 5)
    except ConnectionError:
        answer = b"HTTP/1.1 400"  # cut before it was read to its end, which is a refusal as well
    finally:
        writer.close()
    assert answer.split(b" ")[1] in (status, b"400"), answer
    assert engine.submitted == []


async def test_chunks_and_length_at_once_are_one_request(port: int, engine: FakeEngine) -> None:
    """S18: the classic pair must not make two requests of one, whichever header counts."""
    body = "0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: h\r\n\r\n"
    head = f"{COMPLETIONS}Content-Length: {len(body)}\r\nTransfer-Encoding: chunked"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}\r\n\r\n{body}".encode())
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert b'"object":"list"' not in answer.split(b"\r\n\r\n", 1)[0]
    assert answer.startswith(b"HTTP/1.1 400"), answer[:200]
    assert engine.submitted == []


async def test_a_head_that_trickles_is_given_up(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """S17."""
    monkeypatch.setattr(pipelining, "HEADER_SECONDS", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\n")
    closed = asyncio.create_task(reader.read())
    async with asyncio.timeout(5):
        while not closed.done():
            writer.write(b"X: a\r\n")
            await asyncio.sleep(0.03)
    writer.close()


async def test_a_slow_head_in_time_is_served(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in (b"GET /hea", b"lth HTTP/1.1\r\nHo", b"st: h\r\n", b"\r\n"):
        writer.write(part)
        await asyncio.sleep(0.02)
    assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 200")
    # The clock has been stopped, and the connection can be used again.
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    writer.write(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
    assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_idle_connections_make_room(
    port: int, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S17: with as many half-open connections as may be, a request is answered and a running one goes on."""
    monkeypatch.setattr(pipelining.table, "most", len(pipelining.table) + 8)
    engine.gate.clear()
    asked = asyncio.create_task(raw(port, post("/v1/completions", BASE, "Connection: close")))
    await until(lambda: engine.num_unfinished == 1)
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
    for _, writer in idle[::2]:
        writer.write(b"GET /hea")
    answer = await raw(port, "GET /health HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert len(pipelining.table) <= pipelining.table.most
    engine.gate.set()
    assert (await asked).startswith(b"HTTP/1.1 200")
    for _, writer in idle:
        writer.close()
    await until(lambda: len(pipelining.table) == 0)


async def test_a_template_that_never_ends(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """R9, S8: its request fails, the server answers meanwhile, and no thread is left running."""
    monkeypatch.setattr(service, "RENDER_SECONDS", 0.3)

    def forever(*_: Any, **__: Any) -> str:
        while True:
            sum(range(100))

    app = make_app(engine)
    ask = post("/v1/chat/completions", {"model": "fake", "messages": [{"role": "user", "content": "x"}]},
               "Connection: close")  # fmt: skip
    async with running(app) as port:
        with monkeypatch.context() as patch:
            patch.setattr(FakeTokenizer, "apply_chat_template", forever)
            pending = [asyncio.create_task(raw(port, ask)) for _ in range(4)]
            await until(lambda: sum(t.name == "aserve-render" for t in threading.enumerate()) == 4)
            answer = await raw(port, "GET /health HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200")
            for answer in await asyncio.gather(*pending):
                assert answer.startswith(b"HTTP/1.1 400") and b"chat template took longer" in answer
            await until(lambda: not any(t.name == "aserve-render" for t in threading.enumerate()))
        assert (await raw(port, ask)).startswith(b"HTTP/1.1 200")


async def test_killable_threads() -> None:
    threads = KillableThreads("killable", 2)
    assert await threads.run(lambda: 5, 5.0) == 5
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0, 5.0)
    go_on = threading.Event()
    waiting = [asyncio.create_task(threads.run(lambda: go_on.wait(10), 10.0)) for _ in range(2)]
    await until(lambda: threads.running == 2)
    with pytest.raises(QueueFullError):
        await threads.run(lambda: 5, 5.0)
    go_on.set()
    assert await asyncio.gather(*waiting) == [True, True]
    await until(lambda: threads.running == 0)


async def test_killable_threads_are_judged_by_what_they_compute() -> None:
    threads = KillableThreads("killable", 1)

    def wait() -> str:
        time.sleep(0.3)
        return "waited"

    def compute() -> None:
        while True:
            pass

    assert await threads.run(wait, 0.05) == "waited", "as on a machine that gives it no time"
    with pytest.raises(TimeoutError):
        await threads.run(compute, 0.05)
    await until(lambda: threads.running == 0)
    go_on = threading.Event()
    with pytest.raises(TimeoutError):
        await threads.run(lambda: go_on.wait(10), 0.05)
    go_on.set()
    await until(lambda: threads.running == 0)


async def test_a_bounded_pool() -> None:
    """R29: what does not fit is refused before any work; what is done makes room."""
    pool = BoundedPool("bounded", workers=1, most=3)
    go_on = threading.Event()
    waiting = [asyncio.create_task(pool.run(go_on.wait, 10)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="3 long prompts"):
        await pool.run(int)
    waiting[2].cancel()
    go_on.set()
    assert await asyncio.gather(*waiting[:2]) == [True, True]
    async with asyncio.timeout(5):
        while True:
            try:
                assert await pool.run(int) == 0
                break
            except QueueFullError:
                await asyncio.sleep(0.01)
    pool.close()


def test_a_text_that_cannot_fit_is_refused_untokenised() -> None:
    """R8: by its length alone, with both numbers in the message."""
    from types import SimpleNamespace

    from aserve.engine.input import InputProcessor

    tokenizer = SimpleNamespace(
        eos_token_id=1, is_fast=True, get_vocab=lambda: {"a": 0, "b" * 20: 1, "=" * 50: 2},
        backend_tokenizer=SimpleNamespace(encode=lambda *_: pytest.fail("it was tokenised")),
    )  # fmt: skip
    processor = object.__new__(InputProcessor)  # nothing else of it is needed
    processor.tokenizer = tokenizer
    processor._config = SimpleNamespace(model=SimpleNamespace(max_model_len=100))  # type: ignore[assignment]
    processor._longest_piece = None
    assert not processor.is_doubtful("x" * 1600) and processor.is_doubtful("x" * 1601)
    processor.check_fits("=" * 5000)
    processor.check_fits("x" * 2000 + "é" * 3000)
    for text, length in (("=" * 5001, 5001), ("x" * 2001, 2001), ("=x" * 2001, 4002)):
        with pytest.raises(InvalidRequestError, match=rf"100 tokens; a text of {length} characters"):
            processor.check_fits(text)


async def test_a_large_body_leaves_no_memory_behind(port: int, engine: FakeEngine) -> None:
    """S16: a body over the limit is refused by its length, or as soon as it has come too far."""

    def resident() -> int:
        with open("/proc/self/statm") as source:
            return int(source.read().split()[1]) * 4096

    gc.collect()
    before = resident()
    started = time.monotonic()
    for _ in range(10):
        head = "POST /v1/completions HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode())
        try:
            for _ in range(20):
                writer.write(b"100000\r\n" + b" " * 0x100000 + b"\r\n")
                await writer.drain()
            answer = await asyncio.wait_for(reader.readline(), 5)
            assert answer.split(b" ")[1] == b"413"
        except ConnectionError:
            pass  # closed in the middle of it
        writer.close()
    await until(lambda: len(pipelining.table) == 0)
    gc.collect()
    assert resident() - before < 100 << 20
    assert time.monotonic() - started < 60


async def test_what_is_no_http_is_counted(port: int, engine: FakeEngine) -> None:
    """Refused below the application, and yet among the errors of the metrics."""
    assert engine.stats is not None
    await until(lambda: engine.stats is not None)
    for request, status in ((HEADS[8][0], 501), (HEADS[10][0], 400), ("nonsense\r\n\r\n", 400)):
        before = list(engine.stats.errors)
        answer = await raw(port, request)
        assert answer.split(b" ")[1] == str(status).encode()
        assert engine.stats.errors == [*before, status]
    assert len(pipelining.refusals) == 1
