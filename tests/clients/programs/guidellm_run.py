"""guidellm's command, against the chat, the completions and the responses API."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

from kit import SERVER, WORK, check, main

GUIDELLM = str(Path(sys.executable).with_name("guidellm"))

# Its main process stops listening once nothing has come for this long after the last request, by default
# 0.1 s: on a busy machine the last result then comes too late to be counted.
PATIENT = {**os.environ, "GUIDELLM__MP_POLL_INTERVAL": "2"}


def served() -> float:
    """Requests that the server has ended as they should."""
    with urllib.request.urlopen(SERVER + "/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return sum(map(float, re.findall(r"^vllm:request_success_total{[^}]*} (\S+)$", text, re.MULTILINE)))


def run(name: str, *flags: str) -> list[dict]:
    """The benchmarks of one run over a file of prompts."""
    before = served()
    prompts = WORK / "prompts.txt"
    prompts.write_text("\n".join(f"Tell me about the number {n}." for n in range(16)))
    report = WORK / f"{name}.json"
    ended = subprocess.run(
        [
            GUIDELLM, "run", "--disable-console", "--data", f"kind=text_file,path={prompts}",
            "--constraint", "kind=max_requests,count=8", "--output", f"kind=json,path={report}", *flags,
        ],
        capture_output=True, text=True, timeout=400, check=False, env=PATIENT,
    )  # fmt: skip
    assert served() - before == 8
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-3000:]
    found: list[dict] = json.loads(report.read_text())["benchmarks"]
    return found


def expect_whole(benchmarks: list[dict]) -> None:
    """Eight requests, each with 24 tokens, and their times."""
    (benchmark,) = benchmarks
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    assert totals == {"successful": 8, "errored": 0, "incomplete": 0, "total": 8}, totals
    for metric in ("time_to_first_token_ms", "inter_token_latency_ms", "output_tokens_per_second"):
        assert metrics[metric]["successful"]["mean"] > 0, metric
    tokens = metrics["output_token_count"]["successful"]
    assert 0 < tokens["max"] <= 24, tokens


def backend(**values: str) -> list[str]:
    fields = {"kind": "openai_http", "target": SERVER, "max_tokens": "24", **values}
    return ["--backend", ",".join(f"{key}={value}" for key, value in fields.items())]


@check("chat, four streams at once")
def chat() -> None:
    expect_whole(run("chat", *backend(), "--profile", "kind=concurrent,streams=4"))


@check("completions, one after another")
def completions() -> None:
    flags = backend(request_format="/v1/completions")
    expect_whole(run("completions", *flags, "--profile", "kind=synchronous"))


@check("responses, at a constant rate")
def responses() -> None:
    flags = backend(request_format="/v1/responses")
    expect_whole(run("responses", *flags, "--profile", "kind=constant,rate=4"))


main("guidellm")
