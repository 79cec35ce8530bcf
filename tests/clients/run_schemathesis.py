"""schemathesis over `/openapi.json`, whatever it allows and whatever it does not: for `make schemathesis`.

The server is `aserve serve` on a tiny model with random weights, so that requests go all the way through the
engine and still take milliseconds. One run is without keys; in the other every route needs one, the routes
for operators one of an admin.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from aserve.server.openapi import BODIES
from tests import tiny_checkpoint
from tests.clients.table import ROOT
from tests.e2e.process import Server, wait_until

COMMAND = ROOT / ".venv-clients" / "schemathesis" / "bin" / "schemathesis"
SECONDS = 1500.0
LEAST = 1000
LEAST_TAKEN = 1 / 8
"""Share of the bodies sent to a route that it takes: refusals alone would try little of it."""
KEY = "an-admins-key"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"), max_position_embeddings=256, weights=True)


@pytest.fixture(params=["open", "keys"])
def server(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Iterator[tuple[Server, list[str]]]:
    """A server, and what schemathesis is told to get past its door."""
    flags = ["--served-model-name", "tiny", "--max-num-seqs", "16", "--disable-log-requests"]
    told = []
    if request.param == "keys":
        keys = tmp_path / "keys"
        keys.write_text(f"someone a-key\noperator {KEY} admin\n")
        flags += ["--api-key-file", str(keys)]
        told = ["-H", f"Authorization: Bearer {KEY}"]
    command = [
        sys.executable,
        "-m",
        "aserve",
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        *flags,
    ]
    with Server(command=command) as running:
        yield running, told


def idle(server: Server) -> bool:
    """Whether no request and no cache block is left."""
    text = httpx.get(server.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    names = ("num_requests_running", "num_requests_waiting", "gpu_cache_usage_perc")
    return all(re.search(rf"^vllm:{name}{{[^}}]*}} 0\.0$", text, re.MULTILINE) for name in names)


def taken(har: Path) -> dict[str, float]:
    """The share of requests with a body that each route answered with 200."""
    counts: dict[str, collections.Counter[bool]] = collections.defaultdict(collections.Counter)
    for entry in json.loads(har.read_text())["log"]["entries"]:
        if entry["request"]["method"] == "POST":
            path = urlsplit(entry["request"]["url"]).path
            counts[path][entry["response"]["status"] == 200] += 1
    return {path: counts[path][True] / counts[path].total() for path in BODIES}


@pytest.mark.timeout(SECONDS + 60)
def test_schemathesis(server: tuple[Server, list[str]], tmp_path: Path) -> None:
    running, told = server
    assert COMMAND.exists(), f"no {COMMAND}: run `make schemathesis`"
    cases = os.environ.get("CASES", "50")
    ended = subprocess.run(
        [
            str(COMMAND), "run", running.url + "/openapi.json", *told, "--checks", ",".join(CHECKS),
            "--phases", "examples,coverage,fuzzing,stateful", "--max-examples", cases,
            "--continue-on-failure", "--request-timeout", "60",
            # A busy machine draws slowly, which is nobody's fault.
            "--suppress-health-check", "too_slow",
            "--report", "har", "--report-har-path", str(tmp_path / "sent.har"),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    print(ended.stdout[-4000:])
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    count = re.search(r"(\d+) generated, (\d+) passed", ended.stdout)
    assert count is not None, ended.stdout[-2000:]
    assert int(count[1]) >= LEAST
    shares = taken(tmp_path / "sent.har")
    assert min(shares.values()) >= LEAST_TAKEN, shares
    assert "Traceback" not in running.log, running.log[-8000:]
    assert httpx.get(running.url + "/health/ready").status_code == 200
    wait_until(lambda: idle(running))
    assert running.process.poll() is None
