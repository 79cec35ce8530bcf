"""Locust with the project's own load test, which wants no error and an idle server at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kit import MODEL, SERVER, check, main

FILE = Path(__file__).resolve().parents[3] / "load_tests" / "locustfile.py"


@check("load_tests: 16 users with streamed chats, and /health beside them")
def load() -> None:
    ended = subprocess.run(
        [
            sys.executable, "-m", "locust", "-f", str(FILE), "--headless", "--host", SERVER,
            "-u", "17", "-r", "17", "-t", "15s", "--only-summary",
        ],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "MODEL": MODEL},
    )  # fmt: skip
    output = ended.stdout + ended.stderr
    assert ended.returncode == 0, output[-3000:]
    assert "the server is idle and every cache block is free" in output
    assert "chat: between tokens" in output


main("locust")
