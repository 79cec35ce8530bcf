"""``aserve bench serve`` against the real server over a fake engine, in this process's own loop."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aserve.bench import cli, datasets, serve
from aserve.bench.client import Client
from tests import tiny_checkpoint
from tests.server.conftest import make_app, running
from tests.server.fake_engine import FakeEngine

SMALL = [
    *("--random-input-len", "12", "--random-output-len", "5", "--random-token-range", "32:127"),
    *("--num-prompts", "6", "--disable-tqdm"),
]


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def port(engine: FakeEngine) -> AsyncIterator[int]:
    async with running(make_app(engine)) as found:
        yield found


async def bench(port: int, *flags: str) -> int:
    return await asyncio.to_thread(cli.main, ["serve", "--port", str(port), *SMALL, *flags])


async def test_a_run_prints_the_block_and_saves_it(
    port: int, engine: FakeEngine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--save-result", "--result-dir", str(tmp_path / "new"), "--result-filename", "run.json"]
    assert (
        await bench(port, *flags, "--percentile-metrics", "ttft,e2el", "--metric-percentiles", "50,99") == 0
    )
    shown = capsys.readouterr().out
    assert re.search(r"^Successful requests: +6$", shown, re.MULTILINE)
    assert re.search(r"^Total input tokens: +72$", shown, re.MULTILINE)
    assert re.search(r"^Total generated tokens: +30$", shown, re.MULTILINE)
    assert "P50 E2EL (ms):" in shown and "TPOT" not in shown
    saved = json.loads((tmp_path / "new" / "run.json").read_text())
    assert (saved["completed"], saved["failed"], saved["total_output_tokens"]) == (6, 0, 30)
    assert saved["model_id"] == "fake" and saved["request_rate"] == "inf"
    assert "ttfts" not in saved
    # One warm-up request, then the six.
    assert len(engine.submitted) == 7
    sent = engine.submitted[-1]
    assert len(sent.ids) == 12 and all(32 <= token < 127 for token in sent.ids)
    assert sent.params.max_tokens == 5 and sent.params.temperature == 0 and not sent.params.ignore_eos


async def test_ignore_eos_temperature_and_detail(port: int, engine: FakeEngine, tmp_path: Path) -> None:
    flags = ["--save-detailed", "--result-dir", str(tmp_path), "--num-warmups", "0"]
    assert await bench(port, "--ignore-eos", "--temperature", "0.5", *flags) == 0
    assert len(engine.submitted) == 6
    assert {(each.params.ignore_eos, each.params.temperature) for each in engine.submitted} == {(True, 0.5)}
    (name,) = os.listdir(tmp_path)
    assert name.startswith("infqps-fake-")
    saved = json.loads((tmp_path / name).read_text())
    assert len(saved["ttfts"]) == 6 and [len(gaps) for gaps in saved["itls"]] == [4] * 6
    assert saved["input_lens"] == [12] * 6


async def test_at_most_so_many_at_a_time(port: int, engine: FakeEngine) -> None:
    most = 0
    submit = engine.submit

    async def watched(*args: Any, **options: Any) -> Any:
        nonlocal most
        stream = await submit(*args, **options)
        most = max(most, engine.num_unfinished)
        return stream

    engine.submit = watched  # type: ignore[method-assign]
    engine.tick = 0.002
    assert await bench(port, "--max-concurrency", "2") == 0
    assert most == 2
    most = 0
    assert await bench(port) == 0
    assert most > 2


async def test_chat_sends_messages(port: int, engine: FakeEngine, tmp_path: Path) -> None:
    tokenizer = tiny_checkpoint.write(tmp_path)
    flags = ["--endpoint", "/v1/chat/completions", "--tokenizer", str(tokenizer)]
    assert await bench(port, *flags) == 0
    assert engine.submitted[-1].text.startswith("<user>")


async def test_a_custom_file_is_sent(port: int, engine: FakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hello", "output_tokens": 3}\n')
    flags = ["--dataset-name", "custom", "--dataset-path", str(path)]
    assert await bench(port, *flags, "--custom-output-len", "4") == 0
    assert bytes(engine.submitted[-1].ids[1:]) == b"hello"
    assert engine.submitted[-1].params.max_tokens == 4


async def test_failed_requests_are_counted_and_named(
    port: int, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.fail_after = 2
    assert await bench(port, "--num-warmups", "0") == 1
    shown = capsys.readouterr()
    assert re.search(r"^Failed requests: +6$", shown.out, re.MULTILINE)
    assert "failed on demand" in shown.err


async def test_a_first_request_that_fails_ends_the_run(
    port: int, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await bench(port, "--model", "unknown") == 1
    assert "the first request failed" in capsys.readouterr().err
    assert engine.submitted == []


async def test_goodput(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert await bench(port, "--goodput", "e2el:60000") == 0
    assert "Request goodput (req/s):" in capsys.readouterr().out


async def test_the_key_comes_from_the_environment(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(make_app(engine, api_key=["secret"])) as port:
        monkeypatch.setenv("OPENAI_API_KEY", "wrong")
        assert await bench(port) == 1
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert await bench(port) == 0


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--base-url", "http://127.0.0.1:9", *SMALL]) == 1
    assert "no usable server" in capsys.readouterr().err


async def test_it_waits_for_a_server_that_is_starting() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"data": []}')
        writer.close()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}")
    with pytest.raises(OSError, match="Connect"):
        await serve.wait_for(client, 0)
    waiting = asyncio.create_task(serve.wait_for(client, 20))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    async with await asyncio.start_server(answer, "127.0.0.1", port):
        assert await waiting == {"data": []}
    client.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-prompts", "0"], "at least 1"),
        (["--request-rate", "0"], "above 0"),
        (["--burstiness", "-1"], "above 0"),
        (["--max-concurrency", "0"], "at least 1"),
        (["--random-range-ratio", "1"], "below 1"),
        (["--random-token-range", "9:3"], "LOW:HIGH"),
        (["--dataset-name", "custom"], "--dataset-path"),
        (["--percentile-metrics", "speed"], "speed"),
        (["--base-url", "host:1"], "not an http"),
    ],
)
async def test_settings_that_cannot_work(
    port: int, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await bench(port, *flags) == 2
    assert message in capsys.readouterr().err


def test_arrivals_have_the_rate_and_the_burstiness() -> None:
    assert serve.arrival_gaps(3, float("inf"), 1.0, 0) == [0.0, 0.0, 0.0]
    for burstiness in (0.25, 1.0, 9.0):
        gaps = serve.arrival_gaps(20000, 50.0, burstiness, 1)
        mean = sum(gaps) / len(gaps)
        variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
        assert mean == pytest.approx(0.02, rel=0.05)
        assert variance / mean**2 == pytest.approx(1 / burstiness, rel=0.1)
    assert serve.arrival_gaps(9, 50.0, 1.0, 1) != serve.arrival_gaps(9, 50.0, 1.0, 2)


async def test_no_request_leaves_before_its_time(port: int, engine: FakeEngine) -> None:
    client = Client(f"http://127.0.0.1:{port}")
    body = serve.payload(datasets.Request([40] * 4, 4, 1), "fake", False, ignore_eos=True)
    before = time.perf_counter()
    answers, seconds = await serve.run(client, "/v1/completions", [body] * 4, gaps=[0.05] * 4)
    client.close()
    assert all(answer.start >= before + 0.05 * place for place, answer in enumerate(answers, 1))
    assert seconds >= 0.2


def test_usage_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert cli.main(["races"]) == 2
    assert "throughput" in capsys.readouterr().out
