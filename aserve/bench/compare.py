"""``make bench``: aserve beside its peers, in one run on an idle machine.

Every system is loaded once, in a process of its own, and the systems take turns: A B C, A B C. The work is
always prompts of 128 random token ids, 64 tokens out, greedy, end-of-sequence ignored. A *piece* is a set
of systems that are compared; its figures are ratios within the piece, never across pieces or days.

Figures go to ``build/bench``: ``PIECE.json`` each, and ``report.md`` over all pieces there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aserve import packaged
from aserve.bench import checkpoints, load, report
from aserve.bench.runners.wire import Runner, RunnerError

INPUT, OUTPUT = 128, 64
SIZES = (1, 8, 32, 128)


@dataclass
class Session:
    """The settings of a run, and the processes it has started."""

    out: Path
    threads: int
    rounds: int
    patience: float
    peers: str | None
    runners: list[Runner] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        root = str(Path(__file__).resolve().parents[2])
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        }

    def start(self, name: str, module: str, *arguments: str, peer: bool = False) -> Runner | None:
        """A runner, or None (and a line why) where a peer cannot be run here."""
        python = self.peers if peer else sys.executable
        if python is None:
            say(f"  {name}: left out, the peers are not installed (make bench installs them)")
            return None
        command = [python, "-m", f"aserve.bench.runners.{module}", *arguments]
        try:
            runner = Runner(command, self.out / "logs" / f"{name}.log", self.environment)
        except RunnerError as error:
            if not peer:
                raise
            say(f"  {name}: left out: {str(error).strip().splitlines()[-1]}")
            return None
        say(f"  {name}: {runner.facts['system']}, ready after {runner.facts['ready_seconds']:.1f} s")
        self.runners.append(runner)
        return runner

    def close(self) -> None:
        while self.runners:
            self.runners.pop().close()


def say(text: str) -> None:
    print(text, flush=True)


Run = Callable[[int], dict[str, Any]]


def take_turns(
    session: Session,
    systems: dict[str, Run],
    sizes: Sequence[int],
    skip: Set[tuple[str, int]] = frozenset(),
) -> list[dict[str, Any]]:
    """Runs every system at every size, round by round. One row each: all seconds, and tokens per second.

    A system that has spent its patience at a size sits out the later rounds there.
    """
    for run in systems.values():
        run(1)
    taken: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for size in sizes:
        for _ in range(session.rounds):
            for name, run in systems.items():
                before = taken.setdefault((name, size), [])
                if (name, size) in skip or sum(each["seconds"] for each in before) > session.patience:
                    continue
                result = run(size)
                if result["output_tokens"] != size * OUTPUT:
                    raise RunnerError(f"{name} made {result['output_tokens']} tokens, not {size * OUTPUT}")
                before.append(result)
    rows = []
    for (name, size), results in taken.items():
        if not results:
            continue
        row: dict[str, Any] = {
            "system": name,
            "n": size,
            "runs": len(results),
            "tokens_per_s": size * OUTPUT / statistics.median(each["seconds"] for each in results),
            "best_tokens_per_s": size * OUTPUT / min(each["seconds"] for each in results),
        }
        for key in ("prefill_seconds", "decode_seconds", "ttft_ms", "itl_ms"):
            if key in results[0]:
                row[key] = statistics.median(each[key] for each in results)
        rows.append(row)
        rates = f"{row['tokens_per_s']:8.1f} tok/s (best {row['best_tokens_per_s']:.1f})"
        say(f"    {name:<18} n={size:<4} {rates} over {len(results)} runs")
    return rows


def offline_run(runner: Runner) -> Run:
    return lambda n: runner.ask("run", n=n, input_len=INPUT, output_len=OUTPUT)


def floors(session: Session, runner: Runner, batches: Sequence[int], prefill: int) -> dict[str, Any]:
    """Steps of the worker beside what this machine could do at best in this process."""
    weights, work = runner.ask("weights"), runner.ask("work")
    found: dict[str, Any] = {"weight_bytes": weights["bytes"], "read_gb_per_s": weights["read_rate"] / 1e9}
    found["cold_read_gb_per_s"] = weights["cold_read_rate"] / 1e9
    cold = runner.ask("steps", n=1, input_len=INPUT, output_len=OUTPUT // 2, cold=True)
    found["cold_step_ms"] = cold["step_seconds"] * 1e3
    found["cold_floor_ms"] = weights["bytes"] / weights["cold_read_rate"] * 1e3
    found["steps"] = []
    for n in batches:
        step = runner.ask("steps", n=n, input_len=INPUT, output_len=OUTPUT)
        context = INPUT + OUTPUT / 2
        per_token = work["layers"] + work["head"] + work["attention"] * context
        found["steps"].append(
            {
                "n": n,
                "step_ms": step["step_seconds"] * 1e3,
                "best_ms": step["best_seconds"] * 1e3,
                "read_floor_ms": weights["bytes"] / weights["read_rate"] * 1e3,
                "gop": 2 * n * per_token / 1e9,
            }
        )
    if prefill:
        long = {"n": 1, "input_len": prefill, "output_len": 1}
        seconds = [runner.ask("run", **long)["seconds"] for _ in range(session.rounds)]
        gop = 2 * (prefill * (work["layers"] + work["attention"] * prefill / 2) + work["head"]) / 1e9
        found["prefill"] = {"tokens": prefill, "ms": statistics.median(seconds) * 1e3, "gop": gop}
    short = [runner.ask("run", n=16, input_len=INPUT, output_len=1)["seconds"] for _ in range(session.rounds)]
    found["prefill_ms_per_token"] = statistics.median(short) * 1e3 / (16 * INPUT)
    found["idle_cpu_seconds"] = runner.ask("idle")["cpu_seconds"]
    return found


def compare(
    session: Session,
    engine: dict[str, Any],
    peers: Sequence[tuple[str, str, tuple[str, ...], bool]],
    sizes: Sequence[int] = SIZES,
    *,
    peer_sizes: int = 1 << 30,
    batches: Sequence[int] = SIZES,
    prefill: int = 0,
) -> dict[str, Any]:
    """aserve with these LLM keywords and peers: (name, runner, its arguments, in the peers' environment)."""
    own = session.start("aserve", "engine", json.dumps(engine))
    if own is None:
        raise RunnerError("aserve did not start")
    systems = {"aserve": offline_run(own)}
    facts = {"aserve": own.facts}
    for name, module, arguments, foreign in peers:
        runner = session.start(name, module, *arguments, str(session.threads), peer=foreign)
        if runner is not None:
            systems[name], facts[name] = offline_run(runner), runner.facts
    skip = {(name, n) for name in systems if name != "aserve" for n in sizes if n > peer_sizes}
    rows = take_turns(session, systems, sizes, skip)
    found = floors(session, own, batches, prefill)
    return {"facts": facts, "rows": rows, "floors": found}


def q4_offline(session: Session) -> dict[str, Any]:
    file = str(packaged.resolve("smollm2"))
    peers = [("OpenVINO", "openvino", (file,), True), ("llama.cpp", "llamacpp", (file,), True)]
    return compare(session, {"model": "smollm2", "max_model_len": 2304}, peers, prefill=2048)


def q4_served(session: Session) -> dict[str, Any]:
    """Streams from a server, each client a request, beside the same work offline."""
    own = session.start("aserve-offline", "engine", json.dumps({"model": "smollm2", "max_model_len": 2304}))
    if own is None:
        raise RunnerError("aserve did not start")
    command = [sys.executable, "-m", "aserve", "serve", "smollm2", "--max-model-len", "2304"]
    command += ["--no-enable-prefix-caching"]  # every round sends the same prompts
    with load.Server(command, session.out / "logs" / "aserve-server.log", session.environment) as server:
        systems = {
            "aserve offline": offline_run(own),
            "aserve served": lambda n: load.run(server.url, n, INPUT, OUTPUT),
        }
        rows = take_turns(session, systems, SIZES)
    return {"facts": {"aserve": own.facts}, "rows": rows}


def bf16_offline(session: Session) -> dict[str, Any]:
    file = str(packaged.resolve("smollm2"))
    folder = str(checkpoints.bf16_of(file))
    engine = {"model": folder, "tokenizer": file, "dtype": "bfloat16", "max_model_len": 2304}
    peers = [("transformers", "hf", (folder,), False)]
    return compare(session, engine, peers, peer_sizes=32, prefill=2048)


def gemma_offline(session: Session) -> dict[str, Any]:
    file = str(packaged.resolve("gemma3-270m"))
    peers = [("OpenVINO", "openvino", (file,), True), ("llama.cpp", "llamacpp", (file,), True)]
    engine = {"model": "gemma3-270m", "max_model_len": 2304}
    return compare(session, engine, peers, (1, 8, 32), batches=(1, 8, 32))


def llama1b_offline(session: Session) -> dict[str, Any]:
    folder = str(checkpoints.llama_1b())
    engine = {
        "model": folder,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": 2304,
    }
    session.patience = min(session.patience, 15.0)
    peers = [("transformers", "hf", (folder,), False)]
    return compare(session, engine, peers, (1, 8), batches=(1, 8))


def limits_piece(session: Session) -> dict[str, Any]:
    command = [sys.executable, "-m", "aserve", "bench", "limits", "--threads", str(session.threads)]
    target = session.out / "limits-raw.json"
    done = subprocess.run(
        [*command, "--output-json", str(target)],
        env=os.environ | session.environment,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    say(done.stdout.rstrip())
    found: dict[str, Any] = json.loads(target.read_text())
    target.unlink()
    return {"limits": found}


PIECES: dict[str, Callable[[Session], dict[str, Any]]] = {
    "limits": limits_piece,
    "q4-offline": q4_offline,
    "q4-served": q4_served,
    "bf16-offline": bf16_offline,
    "gemma-offline": gemma_offline,
    "llama1b-offline": llama1b_offline,
}


def chosen_pieces(only: str) -> list[str]:
    """Pieces whose names hold every word of ``only`` (``q4,offline``); all for an empty one."""
    words = [word for word in only.split(",") if word]
    names = [name for name in PIECES if all(word in name.split("-") for word in words)]
    if not names:
        raise SystemExit(f"no piece has all of {words}; pieces: {', '.join(PIECES)}")
    return names


def busy_share(seconds: float = 2.0) -> float:
    """The share of this machine's cores in use by anybody, from /proc/stat; 0 where there is none."""

    def reading() -> tuple[int, int]:
        fields = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return sum(fields), fields[3] + fields[4]

    if not Path("/proc/stat").exists():
        return 0.0
    total, idle = reading()
    time.sleep(seconds)
    later, later_idle = reading()
    return 1 - (later_idle - idle) / max(1, later - total)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", default="", help="words that a piece's name must hold, such as q4,offline")
    parser.add_argument("--peers", help="Python of the environment that has the peers")
    parser.add_argument("--threads", type=int, default=2, help="for every system (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument(
        "--patience", type=float, default=30.0, help="seconds a system may spend at one size (default: 30)"
    )
    parser.add_argument("--busy", choices=["refuse", "warn"], default="refuse", help="on a busy machine")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    names = chosen_pieces(options.only)
    busy = busy_share()
    if busy > 0.1:
        say(f"other work keeps {busy:.0%} of the machine busy: figures taken now mean nothing")
        if options.busy == "refuse":
            say("(BUSY=warn measures all the same)")
            return 1
    options.out.mkdir(parents=True, exist_ok=True)
    peers = options.peers if options.peers and Path(options.peers).exists() else None
    for name in names:
        say(f"{name}:")
        session = Session(options.out, options.threads, options.rounds, options.patience, peers)
        started = time.monotonic()
        try:
            result = PIECES[name](session)
        finally:
            session.close()
        result |= {
            "piece": name,
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "machine": report.cpu_name() or platform.machine(),
            "threads": options.threads,
            "busy_before": busy,
            "seconds": time.monotonic() - started,
        }
        (options.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        say(f"  took {result['seconds']:.0f} s")
    text = report.render(options.out)
    (options.out / "report.md").write_text(text, encoding="utf-8")
    say("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
