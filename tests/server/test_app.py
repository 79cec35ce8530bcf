"""``hypercorn aserve.app:app``, the plain way."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests import tiny_checkpoint
from tests.server.conftest import until

HYPERCORN = "import sys; from hypercorn.__main__ import main; sys.exit(main())"


class Hypercorn:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log = ""

    @property
    def base(self) -> str:
        found = re.search(r"Running on (http://\S+)", self.log)
        return found[1] if found else ""


@asynccontextmanager
async def hypercorn(aserve_args: str, *flags: str, **environment: str) -> AsyncIterator[Hypercorn]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HYPERCORN, "aserve.app:app", "--bind", "127.0.0.1:0", *flags,
        env={**os.environ, "ASERVE_ARGS": aserve_args, **environment},
        stderr=asyncio.subprocess.STDOUT, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    one = Hypercorn(process)

    async def read_on(stdout: asyncio.StreamReader) -> None:
        async for line in stdout:
            one.log += line.decode()

    assert process.stdout is not None
    reader = asyncio.create_task(read_on(process.stdout))
    try:
        yield one
    finally:
        if process.returncode is None:
            process.terminate()
            await asyncio.wait_for(process.wait(), 20)
        await reader


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"))


def tiny(checkpoint: Path) -> str:
    """Flags that serve the checkpoint with random weights."""
    flags = "--load-format dummy --device cpu --dtype float32 --num-gpu-blocks-override 64"
    return f"--model '{checkpoint}' --served-model-name tiny {flags}"


async def test_it_serves(checkpoint: Path) -> None:
    async with hypercorn(tiny(checkpoint) + " --api-key hush --host 10.0.0.1") as one:
        await until(lambda: one.base != "", 60)
        headers = {"Authorization": "Bearer hush"}
        async with httpx.AsyncClient(base_url=one.base, headers=headers, timeout=60) as client:
            body = {"model": "tiny", "prompt": "ab", "max_tokens": 5, "ignore_eos": True}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 5
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/v1/models", headers={"Authorization": ""})).status_code == 401
            # The connection is read by ours, on uvloop, with no flag given.
            reader, writer = await asyncio.open_connection("127.0.0.1", int(one.base.rsplit(":", 1)[1]))
            writer.write(b"GET /version HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n")
            assert b"101" not in await asyncio.wait_for(reader.readline(), 5)
            writer.close()
        one.process.terminate()
        assert await asyncio.wait_for(one.process.wait(), 20) == 0
    assert "not heeded under hypercorn, which has its own: host" in one.log
    assert "hush" not in one.log


async def test_a_load_that_fails_ends_it(checkpoint: Path) -> None:
    async with hypercorn(tiny(checkpoint).replace("dummy", "auto"), "--workers", "0") as one:
        assert await asyncio.wait_for(one.process.wait(), 60) == 1
    assert "the model could not be loaded" in one.log


async def test_two_workers_are_refused(checkpoint: Path) -> None:
    # Hypercorn ends all workers when one ends; its own exit status is then 0, whatever theirs were.
    async with hypercorn(tiny(checkpoint), "--workers", "2") as one:
        await asyncio.wait_for(one.process.wait(), 60)
    assert "Hypercorn runs with more than one worker" in one.log


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("--port 70000", "port must be in 0..65535"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("--model /nowhere/at/all", "/nowhere/at/all"),
        ("--middleware no.such.thing", "middleware 'no.such.thing' cannot be imported"),
    ],
)
async def test_bad_settings_end_it(args: str, sentence: str) -> None:
    async with hypercorn(args, "--workers", "0") as one:
        assert await asyncio.wait_for(one.process.wait(), 60) == 2
    assert sentence in one.log


def _second_worker(results: multiprocessing.Queue[str]) -> None:
    from aserve.app import take_worker_lock
    from aserve.errors import ConfigError

    try:
        results.put("taken" if take_worker_lock() is not None else "not needed")
    except ConfigError as error:
        results.put(str(error))


def test_one_worker_per_hypercorn() -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    # `aserve.app` takes the lock on import, so the worker's own call is the second one in its process:
    # flock counts open files, not processes.
    worker = context.Process(target=_second_worker, args=(results,))
    worker.start()
    answer = results.get(timeout=60)
    worker.join(60)
    assert "more than one worker" in answer


def test_outside_a_worker_no_lock_is_needed() -> None:
    from aserve.app import take_worker_lock

    assert take_worker_lock() is None
