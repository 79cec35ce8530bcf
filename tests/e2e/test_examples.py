"""Every example runs as the README says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.process import Server, idle_afterwards

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str, server: Server | None = None, say: str = "") -> str:
    environment = dict(os.environ)
    if server is not None:
        environment["ASERVE_URL"] = server.url
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments],
        input=say,
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offline() -> None:
    lines = run("offline.py").splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("'The capital of France is' -> ") and "Paris" in lines[0]


def test_notebook() -> None:
    text = run("notebook.py")
    assert "Paris" in text
    assert text.count("length") + text.count("stop") >= 3


def test_stream_client(server: Server) -> None:
    with idle_afterwards(server):
        text = run("stream_client.py", "The sea is", server=server)
    assert text.startswith("The sea is")
    assert "tokens in" in text.splitlines()[-1]


def test_chat(server: Server) -> None:
    with idle_afterwards(server):
        text = run("chat.py", server=server, say="What is the capital of France?\n\n")
    assert len(text) > 10


@pytest.mark.timeout(180)
def test_the_load_test_passes_and_reports_its_rows(server: Server) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", ROOT / "load_tests" / "locustfile.py", "--headless"),
            *("--host", server.url, "-u", "5", "-r", "5", "-t", "6s"),
        ],
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"MAX_TOKENS": "8"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("chat: whole", "chat: first token", "chat: between tokens", "/health"):
        assert row in done.stdout + done.stderr
    assert "every cache block is free" in done.stdout
