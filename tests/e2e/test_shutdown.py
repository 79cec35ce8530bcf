"""How the process ends, and what its open streams see of it."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.e2e.process import Server, wait_until


def body(max_tokens: int) -> dict[str, object]:
    return {
        "model": "smollm2",
        "prompt": "Once upon a time",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }


def test_sigterm_lets_a_stream_finish_and_exits_0() -> None:
    with Server() as server:
        events = []
        with httpx.stream("POST", server.url + "/v1/completions", json=body(120), timeout=60) as answer:
            for line in answer.iter_lines():
                if not events:
                    server.terminate()
                if line.startswith("data: "):
                    events.append(line[6:])
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        assert not any("error" in chunk for chunk in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0
        assert "Traceback" not in server.log


def test_sigterm_ends_a_stream_that_would_outlast_the_drain_with_an_error_event() -> None:
    with Server("--drain-timeout", "0.5") as server:
        events = []
        with httpx.stream("POST", server.url + "/v1/completions", json=body(1900), timeout=60) as answer:
            for line in answer.iter_lines():
                if not events:
                    server.terminate()
                if line.startswith("data: "):
                    events.append(line[6:])
        assert events[-1] == "[DONE]"
        assert "shutting down" in json.loads(events[-2])["error"]["message"]
        assert server.wait() == 0
        assert "Traceback" not in server.log


def test_requests_are_refused_while_draining() -> None:
    with (
        Server() as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body(300)) as answer,
        httpx.Client(base_url=server.url, timeout=60) as other,
    ):
        lines = answer.iter_lines()
        next(lines)
        other.get("/health").raise_for_status()
        server.terminate()
        wait_until(lambda: other.get("/health").status_code == 503)
        refused = other.post("/v1/completions", json=body(1) | {"stream": False})
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait() == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_streams_longer_than_the_frameworks_timeouts_are_not_cut() -> None:
    """Quart cuts responses after 60 s unless told otherwise; waiting in the queue counts."""
    context = 8000

    def run(url: str, tokens: int) -> float:
        started = time.monotonic()
        with httpx.stream("POST", url + "/v1/completions", json=body(tokens), timeout=300) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
        return time.monotonic() - started

    with Server("--max-num-seqs", "1") as server, ThreadPoolExecutor(16) as pool:
        # As many tokens as take about 80 s here, one request after another.
        wanted = int(80 * 200 / run(server.url, 200))
        sizes = [context] * (wanted // context) + [wanted % context + 1]
        assert max(pool.map(lambda size: run(server.url, size), sizes)) > 65
