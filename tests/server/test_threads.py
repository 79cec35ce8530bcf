"""The waiting of OpenMP's threads is settled before torch reads it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SERVER = """
import os, sys
from aserve.threads import calm_threads
assert "torch" not in sys.modules
calm_threads()
print(os.environ["OMP_WAIT_POLICY"])
import aserve.server.app, aserve.server.cli
assert "torch" not in sys.modules
"""

OFFLINE = """
import os
import aserve
aserve.SamplingParams
before = os.environ.get("OMP_WAIT_POLICY")
aserve.{engine}
assert before == (None if os.environ["OMP_WAIT_POLICY"] == "PASSIVE" else "ACTIVE"), before
print(os.environ["OMP_WAIT_POLICY"])
"""

CODES = {"server": SERVER} | {name: OFFLINE.format(engine=name) for name in ("LLM", "AsyncLLMEngine")}


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
@pytest.mark.parametrize("entry", CODES)
def test_threads_wait_asleep_unless_told_otherwise(entry: str, given: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    done = subprocess.run(
        [sys.executable, "-c", CODES[entry]], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
