"""Streaming chats under load: `make load`, or `locust -f load_tests/locustfile.py --host http://...`.

Locust's table gets one row for whole chats, one for the time to the first token, one for the gaps
between tokens, and one for `/health` asked meanwhile. A chat that ends in an error event, or without its
last events, is a failure. When the test ends and every user hangs up, the server has to become idle with
all cache blocks free; otherwise, as after any failure, the exit status is 1.

Environment: MODEL (default: the first that the server lists), MAX_TOKENS (64), API_KEY.
"""

from __future__ import annotations

import json
import os
import random
import time
import urllib.request
from typing import Any

from locust import constant, constant_pacing, events, task
from locust.contrib.fasthttp import FastHttpUser
from locust.env import Environment

MAX_TOKENS = int(os.environ.get("MAX_TOKENS", "64"))
HEADERS = {"Authorization": f"Bearer {os.environ['API_KEY']}"} if "API_KEY" in os.environ else {}
IDLE_SECONDS = 10.0
BUSY_SERIES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:gpu_cache_usage_perc")
SUBJECTS = ("the sea", "a bicycle", "winter", "bread", "a lighthouse", "chess", "the moon", "a violin")
TASKS = ("Write a short poem about", "Explain to a child", "List five facts about", "Tell a story about")


class StreamError(Exception):
    """A chat did not end as it should."""


def fetch(host: str, path: str) -> bytes:
    request = urllib.request.Request(host + path, headers=HEADERS)
    with urllib.request.urlopen(request, timeout=30) as answer:
        body: bytes = answer.read()
        return body


@events.test_start.add_listener
def choose_model(environment: Environment, **_: Any) -> None:
    ChatUser.model = (
        os.environ.get("MODEL") or json.loads(fetch(environment.host, "/v1/models"))["data"][0]["id"]
    )


@events.quitting.add_listener
def expect_idle(environment: Environment, **_: Any) -> None:
    """Every user has hung up by now, most of them in the middle of a stream."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        lines = fetch(environment.host, "/metrics").decode().splitlines()
        left = {
            name: float(line.rsplit(" ", 1)[1])
            for line in lines
            for name in BUSY_SERIES
            if line.startswith(name + "{")
        }
        if len(left) == len(BUSY_SERIES) and not any(left.values()):
            print("the server is idle and every cache block is free")
            return
        if time.monotonic() > deadline:
            print(f"FAILED: {IDLE_SECONDS:g} s after the last user left the server still has {left}")
            environment.process_exit_code = 1
            return
        time.sleep(0.1)


class ChatUser(FastHttpUser):
    """Asks one question after another and reads every token of the answers."""

    wait_time = constant(0)
    network_timeout = connection_timeout = 600.0
    model = ""

    @task
    def chat(self) -> None:
        question = f"{random.choice(TASKS)} {random.choice(SUBJECTS)}."
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0.8,
            "stream": True,
        }
        started = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions",
            json=body,
            headers=HEADERS,
            name="chat: headers",
            stream=True,
            catch_response=True,
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {response.text}")
                return
            response.success()
            try:
                self.read(response.stream, started)
            except Exception as error:
                self.report("chat: whole", started, error)
            else:
                self.report("chat: whole", started)

    def read(self, stream: Any, started: float) -> None:
        """Read a stream to its end, reporting each token. Raises StreamError if it is not whole."""
        previous: float | None = None
        finished = False
        while line := stream.readline(b"\n"):
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                if not finished:
                    raise StreamError("[DONE] without a finish_reason")
                return
            chunk = json.loads(data)
            if "error" in chunk:
                raise StreamError(str(chunk["error"]))
            for choice in chunk["choices"]:
                if choice["delta"].get("content"):
                    if previous is None:
                        self.report("chat: first token", started)
                    else:
                        self.report("chat: between tokens", previous)
                    previous = time.perf_counter()
                finished = finished or choice["finish_reason"] is not None
        raise StreamError("the connection was closed before [DONE]")

    def report(self, name: str, since: float, error: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type="SSE",
            name=name,
            response_time=1000 * (time.perf_counter() - since),
            response_length=0,
            exception=error,
            context={},
        )


class HealthProbe(FastHttpUser):
    """One user that asks `/health` ten times a second, as a probe would, to see what the load does to it."""

    fixed_count = 1
    wait_time = constant_pacing(0.1)

    @task
    def health(self) -> None:
        self.client.get("/health", headers=HEADERS)
