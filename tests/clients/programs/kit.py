"""What the programs share: named checks, and one line of JSON about them.

A program is run by the Python of its client's own environment with the server's address in ``BASE_URL``,
without a slash at its end, and an empty folder in ``WORK``. It needs nothing of aserve. Its last line on
standard output is ``{"versions": {package: version}, "checks": [{"what", "seconds", "error"}]}``, the error
null if there was none.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = os.environ.get("BASE_URL", "")
BASE = SERVER + "/v1"
WORK = Path(os.environ.get("WORK", "."))
MODEL = "smollm2"
KEY = "none"
SECONDS = 120.0

CAPITAL = "What is the capital of France? Answer with one word."
USER = [{"role": "user", "content": CAPITAL}]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Oslo", "Lima"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 5},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "weather"}}

_checks: list[tuple[str, Callable[[], Any]]] = []


def check(what: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Makes a function, plain or async, one of the program's checks; it fails by an exception."""

    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        _checks.append((what, function))
        return function

    return add


def weather_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call of WEATHER, which must be of its schema."""
    found: dict[str, Any] = json.loads(text)
    assert found.keys() == {"city", "days"}, found
    assert found["city"] in ("Paris", "Oslo", "Lima"), found
    assert isinstance(found["days"], int), found
    assert 1 <= found["days"] <= 5, found
    return found


def main(*packages: str, **programs: str) -> None:
    """Runs every check, says what came of them, and exits 1 if one failed.

    packages: whose versions are told. programs: versions of what is no package.
    """
    found = []
    for what, function in _checks:
        started = time.perf_counter()
        error = None
        try:
            result = function()
            if inspect.isawaitable(result):
                asyncio.run(_finish(result))
        except Exception as raised:
            traceback.print_exc()
            error = f"{type(raised).__name__}: {raised}"[:500]
        found.append({"what": what, "seconds": round(time.perf_counter() - started, 2), "error": error})
    versions = {package: importlib.metadata.version(package) for package in packages} | programs
    print(json.dumps({"versions": versions, "checks": found}), flush=True)
    sys.exit(any(each["error"] is not None for each in found))


async def _finish(result: Any) -> None:
    await result
