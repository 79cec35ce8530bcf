"""Spans of requests: what is in them, whose trace they belong to, and that they are off by default."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from aserve import faults
from aserve.args import AsyncEngineArgs
from aserve.engine.async_engine import AsyncLLMEngine
from aserve.errors import ConfigError
from aserve.server import app as app_module
from aserve.server import cli
from tests import tiny_checkpoint
from tests.server.conftest import make_app, running, until

ENDPOINT = "http://127.0.0.1:9/v1/traces"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "tracestate": "a=b"}
PROMPT = "nobody may see this"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"), weights=True)


@asynccontextmanager
async def serving(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, exporter: SpanExporter, **values: Any
) -> AsyncIterator[tuple[AsyncLLMEngine, httpx.AsyncClient]]:
    monkeypatch.setattr(app_module, "exporter_to", lambda endpoint: exporter)
    args = AsyncEngineArgs(
        model=str(checkpoint), served_model_name=["tiny"], dtype="float32", device="cpu",
        num_gpu_blocks_override=512, swap_space=0, disable_log_requests=True,
    )  # fmt: skip
    engine = AsyncLLMEngine.from_engine_args(args)
    app = make_app(engine, **{"otlp_traces_endpoint": ENDPOINT, **values})  # type: ignore[arg-type]
    async with (
        running(app) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        await until(lambda: engine.is_running, 60)
        yield engine, client


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}


async def test_spans_of_every_route(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    chat = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}
    async with serving(checkpoint, monkeypatch, exporter) as (_, client):
        for path, body, headers in (
            ("/v1/completions", {**BODY, "n": 2, "temperature": 0.7}, PARENT),
            ("/v1/chat/completions", {**chat, "stream": True}, {}),
            ("/v1/messages", chat, {"traceparent": "00-nonsense"}),
            ("/v1/responses", {"model": "tiny", "input": PROMPT, "max_output_tokens": 16}, PARENT),
            ("/v1/embeddings", {"model": "tiny", "input": [PROMPT, "and this"]}, PARENT),
        ):
            answer = await client.post(path, json=body, headers=headers)
            assert answer.status_code == 200, answer.text
    spans = exporter.get_finished_spans()  # all of them, although the server has ended
    assert [span.name.split()[0] for span in spans] == [
        "text_completion", "chat", "chat", "chat", "embeddings", "embeddings",
    ]  # fmt: skip
    assert all(span.name.endswith(" tiny") and span.kind is SpanKind.SERVER for span in spans)
    assert [span.parent is not None for span in spans] == [True, False, False, True, True, True]
    for span in spans:
        assert span.context is not None
        assert (span.context.trace_id == int(TRACE, 16)) is (span.parent is not None)
        assert PROMPT not in span.to_json() and "nobody" not in span.to_json()
        assert span.resource.attributes["service.name"] == "aserve"
        found = attributes(span)
        assert found["gen_ai.operation.name"] == span.name.split()[0]
        assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "tiny"
        assert found["gen_ai.usage.input_tokens"] > 0
        assert span.end_time is not None and span.start_time is not None
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(found["gen_ai.latency.e2e"], abs=0.1)
        assert 0 <= found["gen_ai.latency.time_in_queue"] <= found["gen_ai.latency.e2e"]
        assert "error.type" not in found and span.status.status_code is StatusCode.UNSET
    first = attributes(spans[0])
    assert first["gen_ai.response.finish_reasons"] == ("length", "length")
    assert (first["gen_ai.usage.output_tokens"], first["gen_ai.request.max_tokens"]) == (8, 4)
    assert (first["gen_ai.request.temperature"], first["gen_ai.request.choice.count"]) == (0.7, 2)
    assert first["gen_ai.latency.time_to_first_token"] >= first["gen_ai.latency.time_in_queue"]
    assert "gen_ai.response.finish_reasons" not in attributes(spans[-1])


async def test_requests_that_end_otherwise(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    async with serving(checkpoint, monkeypatch, exporter) as (engine, client):
        with faults.armed("sampler_row", when=lambda *_: True):
            answer = await client.post("/v1/completions", json={**BODY, "temperature": 1.0})
            assert answer.status_code == 500
        slowly = faults.armed("executor", when=lambda *_: True, act=lambda *_: time.sleep(0.02))
        with slowly:
            long = {**BODY, "max_tokens": 60}
            answer = await client.post("/v1/completions", json={**long, "timeout": 0.05})
            assert answer.status_code == 408
            async with client.stream("POST", "/v1/completions", json={**long, "stream": True}):
                await until(lambda: engine.num_unfinished == 1)
            await until(lambda: engine.num_unfinished == 0)
        # What is refused before it is a request of the engine has no span.
        assert (await client.post("/v1/completions", json={**BODY, "n": 0})).status_code == 400
        assert not engine.engine.output.tracer._open  # type: ignore[union-attr]
    failed, late, left = exporter.get_finished_spans()
    assert failed.status.status_code is StatusCode.ERROR
    assert attributes(failed)["error.type"] == "RequestFailedError"
    assert attributes(failed)["aserve.cause"] == "failed"
    assert (attributes(late)["error.type"], attributes(late)["aserve.cause"]) == (
        "timeout",
        "aborted: timeout",
    )
    assert attributes(left)["error.type"] == "cancelled"
    assert "aserve.cause" in attributes(left)


async def test_a_broken_tracer_costs_only_its_spans(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    async with serving(checkpoint, monkeypatch, exporter) as (_, client):
        with faults.armed("-", path="aserve.server.tracing:RequestTraces._attributes") as site:
            answer = await client.post("/v1/completions", json=BODY)
        assert site.hits == 1
        assert answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] == "length"
    assert exporter.get_finished_spans() == ()


async def test_a_collector_that_is_not_there(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests do not notice, and the server ends all the same."""
    from aserve.server.tracing import exporter_to

    exporter = exporter_to(ENDPOINT)
    async with asyncio.timeout(60):
        async with serving(checkpoint, monkeypatch, exporter) as (_, client):
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200


async def test_off_by_default(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    async with serving(checkpoint, monkeypatch, exporter, otlp_traces_endpoint=None) as (engine, client):
        assert engine.engine is not None and engine.engine.output.tracer is None
        assert (await client.post("/v1/completions", json=BODY, headers=PARENT)).status_code == 200
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://a:4317", "http://", "http://a:99999999/"])
def test_endpoints_that_cannot_work(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint must be"):
        make_app(None, otlp_traces_endpoint=endpoint)  # type: ignore[arg-type]


def test_without_the_extra_it_ends_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec

    def find(name: str, *args: Any) -> Any:
        if name.startswith("opentelemetry.exporter"):
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert cli.main(["serve", "smollm2", "--port", "0", "--otlp-traces-endpoint", ENDPOINT]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "otlp_traces_endpoint needs OpenTelemetry" in said and "aserve[otel]" in said
