"""The server as a process: signals, draining, exit codes, the command line, TLS."""

from __future__ import annotations

import asyncio
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from aserve.server.cli import main, shown
from tests.server.conftest import events, server_args

BODY = {"model": "fake", "prompt": "x", "stream": True}


class Process:
    def __init__(self, process: asyncio.subprocess.Process, base: str, log: list[str]) -> None:
        self.process = process
        self.base = base
        self.log = log

    async def ends(self, seconds: float = 10.0) -> int:
        return await asyncio.wait_for(self.process.wait(), seconds)


@asynccontextmanager
async def server(*flags: str, tick: float = 0.01, load: str = "loads") -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.server.fake_server", str(tick), load,
        "--host", "127.0.0.1", "--port", "0", *flags,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    log: list[str] = []
    base = ""
    while line := (await asyncio.wait_for(process.stderr.readline(), 30)).decode():
        log.append(line)
        if found := re.search(r"API at (\S+)/v1,", line):
            base = found[1]
            break

    async def read_on(stderr: asyncio.StreamReader) -> None:
        log.extend([line.decode() async for line in stderr])

    reader = asyncio.create_task(read_on(process.stderr))
    try:
        yield Process(process, base, log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await reader


async def read(base: str, max_tokens: int, started: asyncio.Event) -> list[Any]:
    data = b""
    async with (
        httpx.AsyncClient(timeout=20) as client,
        client.stream("POST", f"{base}/v1/completions", json={**BODY, "max_tokens": max_tokens}) as answer,
    ):
        async for piece in answer.aiter_raw():
            data += piece
            started.set()
    return events(data)


async def begin(base: str, max_tokens: int) -> asyncio.Task[list[Any]]:
    started = asyncio.Event()
    task = asyncio.create_task(read(base, max_tokens, started))
    await asyncio.wait_for(started.wait(), 10)
    return task


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_drain_lets_streams_finish(number: signal.Signals) -> None:
    async with server("--drain-timeout", "20") as one, httpx.AsyncClient(base_url=one.base) as client:
        assert (await client.get("/health")).status_code == 200
        stream = await begin(one.base, 60)
        one.process.send_signal(number)
        for _ in range(200):  # the signal is on its way
            refused = await client.post("/v1/completions", json={**BODY, "max_tokens": 1})
            if refused.status_code == 503:
                break
            await asyncio.sleep(0.005)
        assert refused.status_code == 503
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["message"] == "the server is shutting down"
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/health/live")).status_code == 200
        assert not stream.done()
        *chunks, done = await stream
        assert len(chunks) == 60
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert done == "[DONE]"
        assert await one.ends() == 0
    assert not any("Traceback" in line for line in one.log)


async def test_a_drain_ends_long_streams_with_a_word() -> None:
    async with server("--drain-timeout", "0.2") as one, httpx.AsyncClient(timeout=20) as client:
        stream = await begin(one.base, 4000)
        plain = asyncio.create_task(
            client.post(
                f"{one.base}/v1/completions", json={"model": "fake", "prompt": "x", "max_tokens": 4000}
            )
        )
        await asyncio.sleep(0.1)
        one.process.send_signal(signal.SIGTERM)
        *chunks, error, done = await stream
        assert chunks
        assert error["error"]["code"] == 503
        assert error["error"]["message"] == "the server is shutting down"
        assert done == "[DONE]"
        assert (await plain).status_code == 503
        assert await one.ends() == 0


async def test_a_second_signal_does_not_wait() -> None:
    async with server("--drain-timeout", "1000") as one:
        stream = await begin(one.base, 4000)
        one.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        assert one.process.returncode is None
        one.process.send_signal(signal.SIGTERM)
        assert await one.ends() == 0
        try:
            *_, error, done = await stream
        except httpx.RemoteProtocolError:
            pass  # cut before the last words were out, which is what was asked for
        else:
            assert (error["error"]["code"], done) == (503, "[DONE]")


async def test_idle_connections_do_not_hold_the_exit_up() -> None:
    async with server() as one, httpx.AsyncClient(base_url=one.base) as client:
        await client.get("/health")
        one.process.send_signal(signal.SIGTERM)
        assert await one.ends() == 0


async def test_a_model_that_cannot_be_loaded_ends_the_process() -> None:
    async with server(load="fails") as one:
        assert await one.ends() == 1
        assert one.base == ""
        said = [line for line in one.log if "could not be loaded" in line]
        assert len(said) == 1
        assert "the disk is on fire" in said[0]


async def test_a_dead_engine_tells_everybody_and_ends_the_process() -> None:
    async with server(load="dies") as one, httpx.AsyncClient(base_url=one.base, timeout=20) as client:
        streams = [await begin(one.base, 4000) for _ in range(4)]
        for stream in streams:
            *chunks, error, done = await stream
            assert chunks and (error["error"]["code"], done) == (500, "[DONE]")
            assert error["error"]["message"] == "the engine loop has failed: RuntimeError: lost at …"
        # For a second it still says what has become of it.
        assert (await client.get("/health")).status_code == 500
        assert (await client.get("/health/live")).status_code == 503
        assert await one.ends(5.0) == 1
    assert sum("the engine is dead" in line for line in one.log) == 1


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, cert


async def test_tls(certificate: tuple[Path, Path]) -> None:
    key, cert = map(str, certificate)
    async with server("--ssl-keyfile", key, "--ssl-certfile", cert) as one:
        assert one.base.startswith("https://")
        context = ssl.create_default_context(cafile=cert)
        context.set_alpn_protocols(["h2", "http/1.1"])
        async with httpx.AsyncClient(base_url=one.base, verify=context) as client:
            answer = await client.get("/v1/models")
            assert answer.status_code == 200
            assert answer.http_version == "HTTP/1.1"
        one.process.send_signal(signal.SIGTERM)
        assert await one.ends() == 0


async def test_a_client_certificate_can_be_demanded(certificate: tuple[Path, Path]) -> None:
    key, cert = map(str, certificate)
    flags = ("--ssl-keyfile", key, "--ssl-certfile", cert, "--ssl-ca-certs", cert, "--ssl-cert-reqs", "2")
    async with server(*flags) as one:
        context = ssl.create_default_context(cafile=cert)
        async with httpx.AsyncClient(base_url=one.base, verify=context) as client:
            with pytest.raises(httpx.TransportError):
                await client.get("/health")
        context.load_cert_chain(cert, key)
        async with httpx.AsyncClient(base_url=one.base, verify=context) as client:
            assert (await client.get("/health")).status_code == 200


# ---------------------------------------------------------------- command line


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    import aserve

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == aserve.__version__
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["dance"]) == 2
    assert "unknown command 'dance'" in capsys.readouterr().err


def test_settings_that_cannot_work_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "70000"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("aserve: port must be")
    assert error.count("\n") == 1


def test_keys_are_not_printed() -> None:
    line = shown(server_args(api_key=["hush"], port=1))
    assert "hush" not in line
    assert "port=1" in line


def test_a_taken_port_is_said_before_anything_else() -> None:
    from aserve.errors import ConfigError
    from aserve.server.serve import listen

    with listen("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            listen("127.0.0.1", port)
    with listen(None, 0) as everywhere:
        assert everywhere.getsockname()[0] in ("::", "0.0.0.0")
