"""Turn-taking, the processes behind it, and the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from aserve.bench import compare, report
from aserve.bench.runners.wire import Runner, RunnerError, prompt_ids

ECHO = """
import sys
from aserve.bench.runners import wire

def start():
    print("a library's noise")
    def run(n): return {"twice": 2 * n}
    def fail(): raise ValueError("no such thing")
    def leave(): sys.exit(3)
    return {"system": "echo"}, {"run": run, "fail": fail, "leave": leave}

wire.serve(start)
"""


def session(folder: Path, **settings: Any) -> compare.Session:
    return compare.Session(folder, 1, **({"rounds": 3, "patience": 10.0, "peers": None} | settings))


def test_a_runner_answers_until_it_is_closed(tmp_path: Path) -> None:
    runner = Runner([sys.executable, "-c", ECHO], tmp_path / "log", session(tmp_path).environment)
    assert runner.facts["system"] == "echo" and runner.facts["ready_seconds"] >= 0
    assert runner.ask("run", n=21) == {"twice": 42}
    with pytest.raises(RunnerError, match="no such thing"):
        runner.ask("fail")
    assert runner.ask("run", n=1) == {"twice": 2}
    runner.close()
    assert "a library's noise" in (tmp_path / "log").read_text()
    with pytest.raises(RunnerError):
        runner.ask("run", n=1)


def test_a_runner_that_ends_says_how(tmp_path: Path) -> None:
    code = ECHO.replace("wire.serve(start)", "raise SystemExit('out of luck')")
    with pytest.raises(RunnerError, match="out of luck"):
        Runner([sys.executable, "-c", code], tmp_path / "log", session(tmp_path).environment)


def test_a_missing_peer_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert session(tmp_path).start("OpenVINO", "openvino", "file", peer=True) is None
    assert "left out" in capsys.readouterr().out


def test_systems_take_turns(tmp_path: Path) -> None:
    order: list[tuple[str, int]] = []

    def system(name: str, seconds: float) -> compare.Run:
        def run(n: int) -> dict[str, Any]:
            order.append((name, n))
            result = {"seconds": seconds, "output_tokens": n * compare.OUTPUT}
            return result | ({"decode_seconds": 0.01, "prefill_seconds": 0.1} if n == 1 else {})

        return run

    systems = {"aserve": system("aserve", 2.0), "peer": system("peer", 8.0)}
    rows = compare.take_turns(session(tmp_path), systems, (1, 4), {("peer", 4)})
    one = [("aserve", 1), ("peer", 1)]
    assert order[:2] == one  # first use
    assert order[2:] == [*one, *one, ("aserve", 1), *[("aserve", 4)] * 3]  # 16 s are past the patience
    assert [(row["system"], row["n"], row["runs"]) for row in rows] == [
        ("aserve", 1, 3),
        ("peer", 1, 2),
        ("aserve", 4, 3),
    ]
    assert rows[0]["tokens_per_s"] == 32 and rows[0]["decode_seconds"] == 0.01


def test_a_system_that_makes_too_few_tokens_is_no_comparison(tmp_path: Path) -> None:
    def short(n: int) -> dict[str, Any]:
        return {"seconds": 1.0, "output_tokens": 3}

    with pytest.raises(RunnerError, match="3 tokens"):
        compare.take_turns(session(tmp_path), {"aserve": short}, (1,))


def test_pieces_are_chosen_by_words() -> None:
    assert compare.chosen_pieces("") == list(compare.PIECES)
    assert compare.chosen_pieces("q4,offline") == ["q4-offline"]
    assert compare.chosen_pieces("offline") == [name for name in compare.PIECES if "offline" in name]
    with pytest.raises(SystemExit, match="q4-served"):
        compare.chosen_pieces("q5")
    assert set(report.TITLES) == set(compare.PIECES)


def test_work_is_the_same_everywhere() -> None:
    assert prompt_ids(3, 8, 49152) == compare.load.random_ids(3, 8)
    assert max(prompt_ids(0, 2000, 500)) < 500


def test_the_report(tmp_path: Path) -> None:
    about = {"date": "2000-01-01", "machine": "m", "threads": 2}
    limits = {"threads": 2, "read_gb_per_s": {"64 MiB": 50.0}, "peak_gop_per_s": {"fp32 FMA": 400.0}}
    rows = [
        {"system": "aserve", "n": 1, "tokens_per_s": 300.0, "best_tokens_per_s": 310.0}
        | {"prefill_seconds": 0.05, "decode_seconds": 0.0025},
        {"system": "peer", "n": 1, "tokens_per_s": 60.0, "best_tokens_per_s": 61.0}
        | {"prefill_seconds": 0.4, "decode_seconds": 0.01},
        {"system": "aserve", "n": 8, "tokens_per_s": 700.0, "best_tokens_per_s": 710.0},
    ]
    step = {"n": 1, "step_ms": 2.4, "best_ms": 2.3, "read_floor_ms": 1.8, "gop": 0.48}
    floors = {
        "weight_bytes": 90e6,
        "read_gb_per_s": 50.0,
        "cold_read_gb_per_s": 30.0,
        "cold_step_ms": 4.0,
        "cold_floor_ms": 3.0,
        "steps": [step],
        "prefill": {"tokens": 2048, "ms": 800.0, "gop": 160.0},
        "prefill_ms_per_token": 0.35,
        "idle_cpu_seconds": 0.0,
    }
    served = [
        {"system": "aserve offline", "n": 8, "tokens_per_s": 700.0, "best_tokens_per_s": 700.0},
        {"system": "aserve served", "n": 8, "tokens_per_s": 665.0, "best_tokens_per_s": 680.0}
        | {"ttft_ms": 120.0, "itl_ms": 9.5},
    ]
    for name, piece in (
        ("limits", {"limits": limits}),
        ("q4-offline", {"rows": rows, "floors": floors}),
        ("q4-served", {"rows": served}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(piece | about))
    text = report.render(tmp_path)
    assert "| peer | 60 (61), x 5.00 | - |" in text
    assert "| peer | 400 | 100.0 | x 4.00 |" in text  # decode alone
    assert "**72% of the plain read**" in text
    assert "| decode, batch 1 | 2.40 | 75% | 50% |" in text
    assert "| prefill of 2048, whole engine | 800.0 |  | 50% |" in text
    assert "| aserve served | 665 (680), 95% of offline |" in text
    assert "| aserve served, n=8 | 120 | 9.50 |" in text
