"""Events written straight to the socket are what the generic way sends, to everybody who reads."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from quart import Quart

from aserve.engine.stream import Mailbox, OutputStream
from aserve.messages.inputs import OutputKind
from aserve.messages.outputs import CompletionOutput, RequestOutput
from aserve.server import direct, sse
from aserve.server.connection import EventStream
from aserve.server.direct import ChunkWriter, Courier, LiveEvents
from aserve.server.openai.generation import Streams
from aserve.server.pipelining import ReadingH11Protocol
from tests.server.conftest import events, make_app, post, raw, running, until
from tests.server.fake_engine import FakeEngine

TEXTS = ("", "plain", 'quotes " and \\ and \n\r\t\0', "é😀\u2028\ufffd", "</script>", "x" * 5000)
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]
USAGE = {"include_usage": True}
ALWAYS = {"include_usage": True, "continuous_usage_stats": True}

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": (COMPLETIONS, {"prompt": "x"}),
    "n": (COMPLETIONS, {"prompt": "x", "n": 3}),
    "best of": (COMPLETIONS, {"prompt": "x", "n": 2, "best_of": 4}),
    "prompts": (COMPLETIONS, {"prompt": ["x", "y"]}),
    "logprobs": (COMPLETIONS, {"prompt": "x", "logprobs": 2}),
    "echo": (COMPLETIONS, {"prompt": "x", "echo": True}),
    "echo with logprobs": (COMPLETIONS, {"prompt": "xy", "echo": True, "logprobs": 1}),
    "echo alone": (COMPLETIONS, {"prompt": "x", "echo": True, "max_tokens": 0}),
    "usage": (COMPLETIONS, {"prompt": "x", "stream_options": USAGE}),
    "usage always": (COMPLETIONS, {"prompt": "x", "stream_options": ALWAYS}),
    "chat": (CHAT, {"messages": USER}),
    "chat n": (CHAT, {"messages": USER, "n": 2}),
    "chat best of": (CHAT, {"messages": USER, "n": 2, "best_of": 3}),
    "chat logprobs": (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 2}),
    "chat usage": (CHAT, {"messages": USER, "stream_options": USAGE}),
    "chat usage always": (CHAT, {"messages": USER, "stream_options": ALWAYS}),
    "chat echo": (
        CHAT,
        {
            "messages": [*USER, {"role": "assistant", "content": "w"}],
            "echo": True,
            "add_generation_prompt": False,
        },
    ),
}


# ---------------------------------------------------------------- templates


@pytest.mark.parametrize("text", TEXTS)
def test_a_filled_template_is_the_event(text: str) -> None:
    def make(text: str) -> dict[str, Any]:
        return {"id": "a", "choices": [{"text": text, "logprobs": None}], "usage": {"n": 1}}

    assert sse.Template(make).fill(text) == sse.event(make(text))


@pytest.mark.parametrize("make", [lambda text: {}, lambda text: {"a": text, "b": text}])
def test_a_template_needs_its_string_once(make: Any) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        sse.Template(make)


# ---------------------------------------------------------------- the same bytes


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What went the short way."""
    found: list[bytes] = []

    def counting(write: Any) -> Any:
        def count(self: ChunkWriter, data: bytes) -> bool:
            done: bool = write(self, data)
            if done:
                found.append(data)
            return done

        return count

    for name in ("write", "write_last"):
        monkeypatch.setattr(ChunkWriter, name, counting(getattr(ChunkWriter, name)))
    return found


def unchunked(answer: bytes) -> tuple[bytes, bytes]:
    """Head and body of an answer; the chunks must be whole and the last one empty."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return head, rest
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        data, rest = rest[: int(size, 16)], rest[int(size, 16) :]
        assert rest.startswith(b"\r\n")
        rest = rest[2:]
        if not data:
            assert rest == b""
            return head, body
        body += data


def comparable(body: bytes) -> list[Any]:
    found = events(body)
    for event in found:
        if isinstance(event, dict):
            event.pop("id", None), event.pop("created", None)
    return found


@pytest.mark.parametrize("name", CALLS)
async def test_both_ways_send_the_same(name: str, written: list[bytes]) -> None:
    path, asked = CALLS[name]
    body = {"model": "fake", "max_tokens": 7, "temperature": 1, "stream": True, **asked}
    app = make_app(FakeEngine())
    async with running(app) as port:
        head, short = unchunked(await raw(port, post(path, body, "Connection: close")))
        assert head.startswith(b"HTTP/1.1 200") and b"chunked" in head.lower()
        # h11 frames HTTP/1.0 bodies by the end of the connection: there is no short way there.
        count = len(written)
        old = post(path, body).replace("HTTP/1.1", "HTTP/1.0")
        head, long = unchunked(await raw(port, old))
        assert b"chunked" not in head.lower() and len(written) == count
    assert comparable(short) == comparable(long)
    assert short.endswith(sse.DONE) and short.count(sse.DONE) == 1
    if "best_of" not in asked or path == CHAT:
        assert written and b"".join(written) in short


async def test_the_last_event_leaves_with_the_end_of_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorded:
        def __init__(self, transport: Any) -> None:
            self._transport = transport

        def write(self, data: bytes) -> None:
            writes.append(data)
            self._transport.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._transport, name)

    writes: list[bytes] = []
    original: Any = ReadingH11Protocol.transport
    monkeypatch.setattr(ReadingH11Protocol, "transport", property(lambda self: Recorded(original.fget(self))))
    body = {"model": "fake", "prompt": "x", "max_tokens": 5, "stream": True}
    async with running(make_app(FakeEngine())) as port:
        answer = await raw(port, post(COMPLETIONS, body, "Connection: close"))
    assert b"".join(writes) == answer
    assert sse.DONE in writes[-1] and writes[-1].endswith(b"\r\n0\r\n\r\n")
    assert not any(sse.DONE in data for data in writes[:-1])


async def test_a_failure_midway_is_the_same_both_ways(written: list[bytes]) -> None:
    engine = FakeEngine()
    engine.fail_after = 3
    body = {"model": "fake", "max_tokens": 7, "stream": True, "prompt": "x"}
    async with running(make_app(engine)) as port:
        _, short = unchunked(await raw(port, post(COMPLETIONS, body, "Connection: close")))
        _, long = unchunked(await raw(port, post(COMPLETIONS, body).replace("HTTP/1.1", "HTTP/1.0")))
    assert comparable(short) == comparable(long)
    assert "failed on demand" in str(comparable(short)[-2]) and len(comparable(short)) == 5


class Passing:
    """An ASGI middleware that wraps ``send``, as one that compresses or counts would."""

    seen: list[bytes] = []  # noqa: RUF012

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def passing(message: Any) -> None:
            self.seen.append(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, passing)


async def test_a_middleware_around_the_application_sees_every_byte(written: list[bytes]) -> None:
    Passing.seen.clear()
    app = make_app(FakeEngine(), middleware=[f"{__name__}.Passing"])
    body = {"model": "fake", "max_tokens": 3, "stream": True, "prompt": "x"}
    async with running(app) as port:
        _, data = unchunked(await raw(port, post(COMPLETIONS, body, "Connection: close")))
    assert not written
    assert data and data in b"".join(Passing.seen)


# ---------------------------------------------------------------- one stream by hand


class Numbers:
    """Events that name the tokens of each output, each ``padding`` bytes long."""

    def __init__(self, padding: int = 0) -> None:
        self.padding = padding
        self.bytes = 0
        self.fail_at: int | None = None

    def events_of(self, prompt_index: int, output: RequestOutput) -> bytes:
        ids = output.outputs[0].token_ids
        if self.fail_at in ids:
            raise ArithmeticError("cannot be told")
        data = sse.event({"ids": ids, "padding": "x" * self.padding})
        self.bytes += len(data)
        return data

    def ending(self) -> bytes:
        return b""


class Hand:
    """An app whose only stream is fed by the test."""

    def __init__(self, padding: int = 0, **options: Any) -> None:
        self.mailbox = Mailbox(OutputKind.DELTA)
        self.aborted: list[str] = []
        self.causes: list[str] = []
        self.call = Numbers(padding)
        self.closed = asyncio.Event()
        self.app: Quart = make_app(FakeEngine())

        @self.app.get("/hand")
        async def hand() -> EventStream:
            streams = Streams([OutputStream("hand", self.mailbox, self.note_abort)])
            live = LiveEvents(streams, self.call, Courier())

            def close() -> None:
                streams.close()
                self.closed.set()

            return EventStream(live, on_close=close, **options)

    def note_abort(self, request_id: str, cause: str) -> None:
        self.aborted.append(request_id)
        self.causes.append(cause)

    def put(self, number: int, last: bool = False) -> None:
        output = CompletionOutput(0, "", [number], 0.0, None, "length" if last else None)
        self.mailbox.put(RequestOutput("hand", None, [], None, [output], last))

    @asynccontextmanager
    async def reading(self) -> Any:
        async with running(self.app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /hand HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            await until(lambda: self.mailbox.notify is not None)
            yield reader
            writer.close()


def numbers(data: bytes) -> list[int]:
    """The tokens named in a chunked body."""
    _, body = unchunked(b"Transfer-Encoding: chunked\r\n\r\n" + data)
    return [number for event in events(body) if isinstance(event, dict) for number in event.get("ids", ())]


async def test_each_step_is_written_at_once_and_in_order(written: list[bytes]) -> None:
    hand = Hand()
    async with hand.reading() as reader:
        for number in range(50):
            hand.put(number)
            assert len(written) == number  # nothing happens in the middle of the engine's step
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert len(written) == number + 1
        hand.put(50, last=True)
        data = await asyncio.wait_for(reader.read(), 5)
    assert numbers(data) == list(range(51))
    assert not hand.aborted


async def test_a_slow_reader_is_waited_for_and_gets_everything() -> None:
    hand = Hand(padding=100_000)
    async with hand.reading() as reader:
        for number in range(300):  # 30 MB
            hand.put(number)
            await asyncio.sleep(0.001)
        # The kernel's buffers and one high-water mark are full; the rest waits as token ids.
        assert hand.call.bytes < 15_000_000
        settled = hand.call.bytes
        hand.put(300, last=True)
        await asyncio.sleep(0.05)
        assert hand.call.bytes == settled
        data = await asyncio.wait_for(reader.read(), 10)
    assert numbers(data) == list(range(301))


async def test_a_reader_that_never_reads_is_given_up() -> None:
    hand = Hand(padding=100_000, send_timeout=0.1)
    async with hand.reading():
        async with asyncio.timeout(10):
            number = 0
            while not hand.closed.is_set():
                hand.put(number)
                number += 1
                await asyncio.sleep(0.001)
    assert hand.aborted == ["hand"] and hand.causes == ["slow_client"]


async def test_an_output_that_cannot_be_told_ends_the_stream_with_an_error() -> None:
    hand = Hand()
    hand.call.fail_at = 2
    async with hand.reading() as reader:
        for number in range(4):
            hand.put(number)
            await asyncio.sleep(0.01)
        data = await asyncio.wait_for(reader.read(), 5)
    assert numbers(data) == [0, 1]
    assert b"error" in data and data.count(b"[DONE]") == 1
    assert hand.aborted == ["hand"]


async def test_pings_come_between_direct_writes() -> None:
    hand = Hand(ping=0.03)
    async with hand.reading() as reader:
        for number in range(3):
            hand.put(number)
            await asyncio.sleep(0.08)
        hand.put(3, last=True)
        data = await asyncio.wait_for(reader.read(), 5)
    assert numbers(data) == [0, 1, 2, 3]
    assert data.count(b": ping\n\n") >= 2


async def test_a_client_that_leaves_is_noticed_in_silence() -> None:
    hand = Hand()
    async with hand.reading():
        hand.put(0)
        await asyncio.sleep(0.01)
    await asyncio.wait_for(hand.closed.wait(), 5)
    assert hand.aborted == ["hand"] and hand.mailbox.notify is None


# ---------------------------------------------------------------- the courier


async def test_the_courier_runs_a_steps_calls_in_one_callback(caplog: pytest.LogCaptureFixture) -> None:
    courier = direct.Courier()
    ran: list[int] = []

    def fail() -> None:
        raise ArithmeticError("one of many")

    courier.call(lambda: ran.append(1))
    courier.call(fail)
    courier.call(lambda: courier.call(lambda: ran.append(3)))
    courier.call(lambda: ran.append(2))
    assert ran == []
    await asyncio.sleep(0)
    assert ran == [1, 2] and "could not be handed on" in caplog.text
    await asyncio.sleep(0)
    assert ran == [1, 2, 3]


def test_no_short_way_behind_a_send_of_somebody_else() -> None:
    async def send(message: Any) -> None:
        orjson.dumps(message)

    scope = {"type": "http", "http_version": "1.1", "method": "POST"}
    assert direct.writer_behind(send, scope) is None
