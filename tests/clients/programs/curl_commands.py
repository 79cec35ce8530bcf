"""curl, as a person types it."""

from __future__ import annotations

import json
import subprocess

from kit import BASE, CAPITAL, MODEL, SERVER, WORK, check, main

BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": CAPITAL}], "max_tokens": 20})


def curl(*arguments: str) -> str:
    """What the command writes; it must exit 0."""
    return subprocess.run(
        ["curl", "--silent", "--show-error", "--max-time", "120", *arguments],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


@check("a chat, with and without a content type")
def chat() -> None:
    for headers in (["-H", "Content-Type: application/json"], []):
        answer = json.loads(curl("--fail", f"{BASE}/chat/completions", *headers, "-d", BODY))
        assert answer["choices"][0]["message"]["content"]


@check("-N: events as they come")
def streamed() -> None:
    body = json.dumps({**json.loads(BODY), "stream": True})
    lines = curl("--fail", "-N", f"{BASE}/chat/completions", "-d", body).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2])


@check("a body from a file, with Expect: 100-continue and chunked")
def uploaded() -> None:
    path = WORK / "body.json"
    padded = {**json.loads(BODY), "metadata": {"padding": "x" * 200_000}}
    path.write_text(json.dumps(padded))
    for headers in (["-H", "Expect: 100-continue"], ["-H", "Transfer-Encoding: chunked"]):
        answer = json.loads(curl("--fail", f"{BASE}/chat/completions", *headers, "--data-binary", f"@{path}"))
        assert answer["usage"]["completion_tokens"] > 0


@check("--http2, which falls back to HTTP/1.1, and --http1.0")
def versions() -> None:
    for version in ("--http2", "--http1.0"):
        answer = json.loads(curl("--fail", version, f"{BASE}/models"))
        assert answer["data"][0]["id"] == MODEL


@check("HEAD, OPTIONS, --compressed and a doubled slash")
def others() -> None:
    assert "200" in curl("--head", f"{SERVER}/health").splitlines()[0]
    assert "200" in curl("--head", f"{SERVER}/").splitlines()[0]
    preflight = curl(
        "-i", "-X", "OPTIONS", f"{BASE}/chat/completions",
        "-H", "Origin: http://example.com", "-H", "Access-Control-Request-Method: POST",
    )  # fmt: skip
    assert "access-control-allow-origin" in preflight.lower()
    assert json.loads(curl("--fail", "--compressed", f"{SERVER}/v1//models"))["data"]


@check("two requests over one connection")
def kept_alive() -> None:
    timing = curl(
        "-o", "/dev/null", "-o", "/dev/null", "-w", "%{num_connects} ", f"{BASE}/models", f"{BASE}/models"
    )
    assert timing.split() == ["1", "0"], timing


@check("errors: status and JSON")
def errors() -> None:
    for path, body, status in (
        ("/chat/completions", "{broken", "400"),
        ("/chat/completions", '{"model": "nobody", "messages": []}', "400"),
        ("/nowhere", "{}", "404"),
    ):
        text, _, code = curl("-w", "\n%{http_code}", f"{BASE}{path}", "-d", body).rpartition("\n")
        assert code == status, (path, code)
        assert json.loads(text)["error"]["message"]


VERSION = curl("--version").split()[1]
main(curl=VERSION)
