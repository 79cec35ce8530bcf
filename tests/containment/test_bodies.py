"""Large bodies: none is parsed in the event loop, and each is answered as it would be if it were small."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import orjson
import pytest

from aserve.args import AsyncEngineArgs
from aserve.bench.hostile import INPUTS, Input
from aserve.engine.input import InputProcessor
from aserve.errors import EngineBusyError, InvalidRequestError
from aserve.guided import limits as guide_limits
from aserve.server import bodies, pipelining
from aserve.server.anthropic.body import MessagesBody
from aserve.server.app import create_app
from aserve.server.bodies import INLINE_BYTES, INLINE_VALUES, BodyReader, is_large
from aserve.server.body_child import MAX_VALUES, count, limited
from aserve.server.openai import protocol
from aserve.server.openai.embeddings import EmbeddingBody
from aserve.server.openai.protocol import MAX_CHOICES, ChatBody, CompletionBody, limits_of
from aserve.server.openai.response_input import ResponseBody
from aserve.server.openai.tokenization import DetokenizeBody
from aserve.server.survey import Limits, Survey
from aserve.tokenizer.loader import load_tokenizer
from tests.server.conftest import make_app, post, raw, running, server_args, until
from tests.server.fake_engine import FakeEngine

COMPLETION, CHAT, DETOKENIZE = limits_of(CompletionBody), limits_of(ChatBody), limits_of(DetokenizeBody)
CONTEXT = 4096


@dataclass
class Watched:
    """An app that is served. parsed: bodies parsed in the event loop. reader: of the large ones."""

    port: int
    engine: FakeEngine
    reader: BodyReader
    parsed: list[bytes] = field(default_factory=list)

    async def ask(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        data = orjson.dumps(body)
        request = (
            f"POST {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        answer = await raw(self.port, request + data.decode("latin-1"))
        head, _, data = answer.partition(b"\r\n\r\n")
        return int(head.split(b" ")[1]), orjson.loads(data)


@asynccontextmanager
async def watching(engine: FakeEngine) -> AsyncIterator[Watched]:
    app = make_app(engine)
    with pytest.MonkeyPatch.context() as patch:
        async with running(app) as port:
            watched = Watched(port, engine, app.extensions["aserve"].bodies)

            def parse(data: bytes) -> dict[str, Any]:
                watched.parsed.append(data)
                return original(data)

            original = protocol.parse
            patch.setattr(protocol, "parse", parse)
            yield watched
        assert watched.reader.pid is None


@pytest.fixture
async def watched(engine: FakeEngine) -> AsyncIterator[Watched]:
    async with watching(engine) as found:
        yield found


# ---------------------------------------------------------------- the hostile inputs

REFUSED_UNREAD = {
    "100,000 biases": "logit_bias",
    "a million ids": "prompt",
    "100,000 prompts": "prompt",
    "100,000 messages": "messages",
    "JSON of brackets": None,
    "10 MB of choices": "guided_choice",
    "a million tokens to decode": "tokens",
    "100,000 inputs to embed": "input",
    "stop strings of 1 MB": "stop",
    "a text of 8 MB": "prompt",
    "a chat of 8 MB": "messages",
    "8 MB to tokenise": "prompt",
    "a model's name of 1 MB": "model",
}
"""What is refused before anything parses it, and the field that the error names."""


BODIES = [each for each in INPUTS if b"\r\nConnection: close" in each.make("fake")[:200]]


@pytest.mark.parametrize("hostile", BODIES, ids=lambda each: each.name)
async def test_no_hostile_body_is_parsed_in_the_loop(watched: Watched, hostile: Input) -> None:
    """R14, S9."""
    request = hostile.make("fake")
    data = request.partition(b"\r\n\r\n")[2]
    answer = await raw(watched.port, request.decode("latin-1"))
    status = int(answer.split(b" ", 2)[1])
    assert hostile.passes(status), answer[:500]
    for parsed in watched.parsed:
        assert len(parsed) <= INLINE_BYTES and parsed.count(b",") <= INLINE_VALUES
    if hostile.name in REFUSED_UNREAD:
        assert (len(watched.parsed), watched.reader.count, status) == (0, 0, 400)
        assert orjson.loads(answer.partition(b"\r\n\r\n")[2])["param"] == REFUSED_UNREAD[hostile.name]
    elif len(data) > INLINE_BYTES:
        assert (len(watched.parsed), watched.reader.count) == (0, 1)
    assert len(watched.parsed) + watched.reader.count <= 1


TOO_LONG: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": "x", "logit_bias": {str(i): 1 for i in range(20_000)}}, "logit_bias"),
    ("/v1/completions", {"prompt": "x", "stop": ["x"] * 50_000}, "stop"),
    ("/v1/completions", {"prompt": ["x"] * 20_000}, "prompt"),
    ("/v1/completions", {"prompt": [[1]] * 20_000}, "prompt"),
    ("/v1/completions", {"prompt": [[1], [1] * 5000] * 20}, "prompt"),
    ("/v1/completions", {"prompt": [1] * 50_000}, "prompt"),
    ("/v1/completions", {"prompt": [2**63] * 6000}, "prompt"),
    ("/v1/completions", {"prompt": [-1] * 6000, "truncate_prompt_tokens": 50}, "prompt"),
    ("/v1/completions", {"prompt": "x", "guided_choice": [f"{i}" for i in range(20_000)]}, "guided_choice"),
    ("/v1/completions", {"prompt": "x", "metadata": [{}] * 70_000}, "metadata"),
    ("/v1/completions", {"prompt": "x", "user": [[[]] * 10] * 7000}, "user"),
    ("/v1/completions", {"prompt": "x" * 70_000, "n": "many"}, "n"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 6000}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "u", "content": [{}] * 1000}] * 70}, "messages"),
    ("/v1/embeddings", {"input": ["x"] * 6000}, "input"),
    ("/detokenize", {"tokens": [1] * 200_000}, "tokens"),
]


@pytest.mark.parametrize("number", range(len(TOO_LONG)))
async def test_a_field_that_is_too_long_is_named(watched: Watched, number: int) -> None:
    path, body, name = TOO_LONG[number]
    status, answer = await watched.ask(path, {"model": "fake", **body})
    assert status == 400, answer
    assert answer["error"]["param"] == answer["param"] == name
    assert name in answer["message"] and len(answer["message"]) < 300
    assert watched.parsed == [] and watched.engine.submitted == []


# ---------------------------------------------------------------- what must go on working


async def test_large_bodies_that_are_meant_are_served() -> None:
    """Each by the same process, and with the same outcome as if it had been parsed in the loop."""
    texts = [f"text {i}, of which there are many, with commas" for i in range(2048)]
    lists = [[i % 200, 1, 2] for i in range(2048)]
    turns = [{"role": "user", "content": "a, b"}, {"role": "assistant", "content": "c"}] * 2000
    escaped = 'é "quoted", \\ and \n' * 5000
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
    model: dict[str, Any] = {"model": "fake", "max_tokens": 1}
    async with watching(FakeEngine(max_model_len=1 << 20, max_num_seqs=8)) as watched:
        engine, asked = watched.engine, 0

        async def ask(path: str, **values: Any) -> Any:
            nonlocal asked
            asked += 1
            engine.submitted.clear()
            status, answer = await watched.ask(path, {**model, **values})
            assert status == 200, answer
            return answer

        assert len((await ask("/v1/embeddings", input=texts))["data"]) == 2048
        assert len((await ask("/v1/embeddings", input=lists))["data"]) == 2048
        assert len((await ask("/v1/completions", prompt=texts))["choices"]) == 2048
        assert sorted(each.ids[1:] for each in engine.submitted) == sorted(list(t.encode()) for t in texts)
        await ask("/v1/completions", prompt=lists)
        assert sorted(each.ids for each in engine.submitted) == sorted(lists)
        ids = [i % 256 for i in range(200_000)]
        await ask("/v1/completions", prompt=ids)
        assert engine.submitted[0].ids == ids and type(engine.submitted[0].ids) is list
        await ask("/v1/completions", prompt=ids, truncate_prompt_tokens=10)
        assert engine.submitted[0].ids == ids[-10:]
        await ask("/v1/completions", prompt=escaped)
        assert bytes(engine.submitted[0].ids[1:]).decode() == escaped
        await ask("/v1/chat/completions", messages=turns)
        assert engine.submitted[0].ids.count(ord(",")) == 2000
        await ask("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], response_format={
            "type": "json_schema", "json_schema": {"name": "s", "schema": schema}})  # fmt: skip
        assert json.loads(engine.submitted[0].params.guided.text) == schema
        assert (await ask("/tokenize", prompt=escaped))["tokens"][1:] == list(escaped.encode())
        assert (await ask("/detokenize", tokens=[97] * 131_072))["prompt"] == "a" * 131_072
        assert (watched.parsed, watched.reader.count) == ([], asked)
        await ask("/v1/completions", prompt="x")
        assert (len(watched.parsed), watched.reader.count) == (1, asked - 1)


async def test_strict_fields_and_notes_see_large_bodies() -> None:
    engine = FakeEngine()
    async with running(make_app(engine, strict_fields=True)) as port:
        body = {"model": "fake", "prompt": "x", "nonsense": "x" * 100_000}
        answer = await raw(port, post("/v1/completions", body, "Connection: close"))
    assert answer.startswith(b"HTTP/1.1 400") and b"nonsense: there is no such field" in answer


# ---------------------------------------------------------------- the process


async def test_the_process_is_ended_by_its_deadline_and_started_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"model": "fake", "prompt": "x", "max_tokens": 2, "user": "x" * 100_000}
    assert (await watched.ask("/v1/completions", large))[0] == 200
    first = watched.reader.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(bodies, "READ_SECONDS", 0.1)
        status, answer = await watched.ask("/v1/completions", large)
    assert status == 400 and "took longer than 0.1 seconds" in answer["message"]
    assert (await watched.ask("/v1/completions", large))[0] == 200
    second = watched.reader.pid
    assert second not in (None, first)
    os.kill(second, signal.SIGKILL)  # type: ignore[arg-type]
    assert (await watched.ask("/v1/completions", large))[0] in (200, 400)  # whichever is noticed first
    assert (await watched.ask("/v1/completions", large))[0] == 200


@pytest.mark.parametrize("warm", [True, False])
async def test_the_server_is_ready_before_the_first_comes(warm: bool) -> None:
    """Also where it is given its engine, as ``aserve serve`` does: the first guide stops every stream."""

    class Warmed(FakeEngine):
        warmed = 0
        checked: ClassVar[list[str]] = []
        engine = SimpleNamespace(input=SimpleNamespace(check_fits=checked.append))

        def warm_guides(self) -> None:
            self.warmed += 1

    engine: Any = Warmed()
    app = create_app(AsyncEngineArgs(model="fake"), server_args(), engine, warm=warm)
    reader: BodyReader = app.extensions["aserve"].bodies
    async with app.test_app():
        await app.extensions["aserve"].ready_engine()
        if warm:
            await until(lambda: reader.pid is not None)
        assert (reader.pid is not None, engine.warmed, len(engine.checked)) == (warm, warm, warm)
    assert reader.pid is None


async def test_large_bodies_that_wait_are_bounded() -> None:
    reader = BodyReader()
    await reader.warm()
    pid = reader.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    data = orjson.dumps({"prompt": "x" * 100_000})
    waiting = [asyncio.create_task(reader.read(data, COMPLETION)) for _ in range(bodies.MOST_WAITING + 3)]
    refused, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert 1 <= len(refused) <= 3
    os.kill(pid, signal.SIGCONT)
    results = await asyncio.gather(*waiting, return_exceptions=True)
    kinds = [type(result).__name__ for result in results]
    assert kinds == ["dict"] * bodies.MOST_WAITING + ["QueueFullError"] * 3
    reader.close()
    assert reader.pid is None
    with pytest.raises(EngineBusyError):
        await reader.read(data, COMPLETION)


async def test_closing_fails_what_waits() -> None:
    reader = BodyReader()
    await reader.warm()
    assert reader.pid is not None
    os.kill(reader.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(reader.read(b'{"prompt":"' + b"x" * 100_000 + b'"}', COMPLETION))
    while not reader.count:  # noqa: ASYNC110 - set in the thread
        await asyncio.sleep(0.005)
    reader.close()
    with pytest.raises(EngineBusyError):
        await waiting


# ---------------------------------------------------------------- what is counted


def flood(
    data: bytes, limits: Limits = COMPLETION, context: int | None = CONTEXT, longest: int | None = None
) -> str | None:
    """The field of the refusal, "" without one; None if the body is let pass."""
    try:
        for size in (len(data), 65_536, 1000):
            survey = Survey(limits, context, longest)
            for start in range(0, len(data), size):
                survey.feed(data[start : start + size])
            survey.finish()
    except InvalidRequestError as error:
        return error.param or ""
    return None


def test_what_is_no_flood_is_let_pass() -> None:
    few = json.dumps({"x": 1}).encode()
    text = "many, [many] {many} commas, " * 20_000
    many_strings = ["x"] * (MAX_VALUES - 100)
    full = [[1] * CONTEXT] * 40
    for body in (
        {"prompt": text},
        {"prompt": '"' * 1_000_000},  # escaped, each of them
        {"prompt": "\\" * 1_000_000 + text},
        {"prompt": "é, \u2028 " * 100_000},
        {"prompt": many_strings},
        {"prompt": full},
        {"prompt": [1] * 500_000, "truncate_prompt_tokens": 5},
        {"prompt": [1] * (CONTEXT + MAX_VALUES - 10)},
    ):
        for data in (json.dumps(body).encode(), json.dumps(body, ensure_ascii=False).encode()):
            assert flood(data) is None, data[:80]
    assert flood(json.dumps({"prompt": [1] * 10**6}).encode(), context=None) is None  # still being loaded
    assert flood(json.dumps({"tokens": [1] * 131_072}).encode(), DETOKENIZE) is None
    assert flood(few * 3) is None


def test_floods_are_told_by_counting() -> None:
    ids = [1] * (CONTEXT + 2 * MAX_VALUES)
    assert flood(json.dumps({"prompt": ids}).encode()) == "prompt"
    assert flood(json.dumps({"prompt": "a", "stop_token_ids": ids}).encode()) == "stop_token_ids"
    assert flood(json.dumps({"messages": ids}).encode(), CHAT) == "messages"
    assert flood(json.dumps({"tokens": [1] * 400_000}).encode(), DETOKENIZE) == "tokens"
    assert flood(json.dumps({"a": {str(i): 1 for i in range(2 * MAX_VALUES)}}).encode()) == "a"
    assert flood(json.dumps({"a": [{}] * (2 * MAX_VALUES)}).encode()) == "a"
    assert flood(json.dumps({"x": "y" * 50_000, "b": ["z"] * (2 * MAX_VALUES)}).encode()) == ""  # too far in


@pytest.mark.parametrize("text", ["plain", "é, ä", "\U0001f600", "two\nlines", 'a "quoted" word', "\x00"])
def test_texts_that_cannot_fit_are_told_by_counting(text: str) -> None:
    """Never one that could fit, whatever stands before and behind it."""
    longest = 300_000
    fits, cannot = (text * (n // len(text)) for n in (longest, 14 * longest))
    for before in ({}, {"a": "b", "c": ["d"] * 1000}, {"e": 'f"g'}, {"h": "i" * longest}):
        for ascii_only in (True, False):

            def body(value: Any, before: Any = before, ascii_only: bool = ascii_only) -> bytes:
                return json.dumps({**before, "prompt": value, "n": 1}, ensure_ascii=ascii_only).encode()

            assert flood(body(fits), longest=longest) is None
            assert flood(body([fits, fits, fits]), longest=longest) is None
            assert flood(body([{"a": fits}, {"b": fits}]), CHAT, longest=longest) is None
            assert flood(body(cannot)) is None  # of a model that is not loaded
            if '"' in text:
                continue  # each quote begins to count anew
            assert flood(body(cannot), longest=longest) in ("prompt", "")
            assert flood(body([fits, cannot]), longest=longest) in ("prompt", "")


def test_where_a_quote_may_be_escaped_nothing_is_told() -> None:
    longest = 100_000
    for text in ("\\" * 10, '\\"' * 10, "x\\"):
        assert flood(json.dumps({"prompt": text + "x" * 2 * longest}).encode(), longest=longest) is None
    many = b'{"a":"' + b"\\n" * 9 + b'","b":[' + b"1," * 200_000 + b"1]}"
    assert flood(many, DETOKENIZE, longest=longest) is None  # no text at all, but a list


async def test_a_refused_body_is_not_waited_for_and_its_sender_reads_the_answer(watched: Watched) -> None:
    """The client sends on; it must not be reset before it has read, nor may it send for ever."""
    reader, writer = await asyncio.open_connection("127.0.0.1", watched.port)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 16000000\r\n\r\n"
    writer.write(head + b'{"model":"fake","prompt":"' + b"x" * 2_000_000)
    answer = await asyncio.wait_for(reader.read(), 30)  # until the end of what the server says
    assert answer.startswith(b"HTTP/1.1 400") and b"string_too_long" in answer
    for _ in range(10):
        writer.write(b"x" * 1_000_000)
        await asyncio.wait_for(writer.drain(), 30)
    writer.close()
    await writer.wait_closed()
    status, _ = await watched.ask("/v1/completions", {"model": "fake", "prompt": "x", "max_tokens": 1})
    assert (status, watched.reader.count) == (200, 0)


@pytest.mark.parametrize("limit", ["MAX_UNREAD", "UNREAD_SECONDS"])
async def test_who_sends_on_for_ever_is_cut_off(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(pipelining, limit, 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", watched.port)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000\r\n\r\n"
    writer.write(head)
    answer = await asyncio.wait_for(reader.read(), 30)
    assert answer.startswith(b"HTTP/1.1 413")
    with pytest.raises(ConnectionError):
        while True:
            writer.write(b"x" * 1000)
            await asyncio.wait_for(writer.drain(), 30)
            await asyncio.sleep(0.02)


def test_where_a_body_is_parsed() -> None:
    assert not is_large(b"[" + b"1," * 4000)  # 8 kB
    assert is_large(b"[" + b"1," * 6000)
    assert not is_large(b"[" + b"1000000000," * 4900)
    assert is_large(b"x" * (INLINE_BYTES + 1)) and not is_large(b"x" * INLINE_BYTES)


def test_values_are_counted_and_ids_packed() -> None:
    assert count({"a": [1, {"b": [[]]}], "c": "x"}) == 7
    data = orjson.dumps({"prompt": [[1, 2], "x", [True, 1], []], "input": [1]})
    assert limited(data, {"prompt": 4}, "prompt") == {
        "prompt": [array("q", [1, 2]), "x", [True, 1], []],
        "input": [1],
    }
    assert limited(b'{"input":[1,2,3]}', {"input": 2}, "input") == {"input": array("q", [1, 2, 3])}


def test_limits_follow_the_fields() -> None:
    assert COMPLETION.most["logit_bias"] == protocol.MAX_BIAS
    assert COMPLETION.most["stop"] == protocol.MAX_STOP
    assert CHAT.most["messages"] == protocol.MAX_MESSAGES and CHAT.ids is None
    assert limits_of(EmbeddingBody).ids == "input" and COMPLETION.ids == "prompt"
    assert {"input", "tools", "metadata"} <= limits_of(ResponseBody).most.keys()
    assert {"messages", "system", "stop_sequences"} <= limits_of(MessagesBody).most.keys()
    assert DETOKENIZE.numbers == DETOKENIZE.most["tokens"]
    assert MAX_CHOICES == guide_limits.MAX_CHOICES


def test_a_long_text_is_tokenised_without_holding_the_interpreter(smollm2_path: Path) -> None:
    """A tokenizer's ``encode`` keeps every other thread waiting until it is done; its batches do not."""
    tokenizer = load_tokenizer(str(smollm2_path), mode="auto", trust_remote_code=False, revision=None)
    batches: list[list[str]] = []

    class Backend:
        def encode(self, text: str, **options: Any) -> Any:
            assert len(text) < 10_000
            return tokenizer.backend_tokenizer.encode(text, **options)

        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            batches.append(texts)
            return tokenizer.backend_tokenizer.encode_batch_fast(texts, **options)

    fields = {"tokenizer": SimpleNamespace(backend_tokenizer=Backend()), "_fast": True, "_quick": None}
    processor: Any = SimpleNamespace(**fields)
    for text in ("short, é", "some words, and more. " * 3000, "a" * 50_000, "é\u2028\n" * 5000):
        for special in (False, True):
            wanted = tokenizer.backend_tokenizer.encode(text, add_special_tokens=special).ids
            assert InputProcessor.encode(processor, text, special) == wanted
    assert len(batches) == 6
