"""The saved pieces of a comparison as Markdown: ``python -m aserve.bench.report [FOLDER]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TITLES = {
    "limits": "This machine",
    "q4-offline": "SmolLM2-135M, Q4_1 GGUF, offline",
    "q4-served": "SmolLM2-135M, Q4_1 GGUF, streamed by the server",
    "bf16-offline": "SmolLM2-135M, bfloat16",
    "gemma-offline": "Gemma 3 270M, Q4_K_M GGUF",
    "llama1b-offline": "A Llama of 1.04 B random bfloat16 weights",
}


def cpu_name() -> str:
    """The processor's own name; empty where the system does not tell."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Every saved piece by name, in the order of TITLES."""
    return {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in TITLES
        if (folder / f"{name}.json").exists()
    }


def render(folder: Path) -> str:
    pieces = load(folder)
    peaks = pieces.get("limits", {}).get("limits", {}).get("peak_gop_per_s", {})
    parts = [
        "# aserve beside its peers\n\nOutput tokens per second of the whole run, prefill included: median "
        "(best) of the rounds. Prompts of 128 random ids, 64 tokens out, greedy. `x` is the median's ratio "
        "aserve / peer, taken within one run on one machine."
    ]
    for name, piece in pieces.items():
        lines = [f"## {TITLES[name]}\n", f"{piece['date']}, {piece['machine']}, {piece['threads']} threads."]
        if "limits" in piece:
            lines += ["", *_limits(piece["limits"])]
        if "rows" in piece:
            lines += ["", *_rows(piece["rows"])]
        if "floors" in piece:
            lines += ["", *_floors(piece["floors"], piece["rows"], peaks)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _limits(found: dict[str, Any]) -> list[str]:
    rows = [[f"read {name}", f"{rate:.1f} GB/s"] for name, rate in found["read_gb_per_s"].items()]
    rows += [[name, f"{rate:.0f} GOP/s"] for name, rate in found["peak_gop_per_s"].items()]
    return _table(["limit", "both threads" if found["threads"] == 2 else "all threads"], rows)


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    systems = list(dict.fromkeys(row["system"] for row in rows))
    sizes = sorted({row["n"] for row in rows})
    by_place = {(row["system"], row["n"]): row for row in rows}
    first, *others = systems
    own_served = first == "aserve offline"
    table = []
    for system in systems:
        cells = [system]
        for size in sizes:
            row = by_place.get((system, size))
            if row is None:
                cells.append("-")
                continue
            cell = f"{row['tokens_per_s']:.0f} ({row['best_tokens_per_s']:.0f})"
            base = by_place.get((first, size))
            if system in others and base is not None:
                if own_served:
                    cell += f", {row['tokens_per_s'] / base['tokens_per_s']:.0%} of offline"
                else:
                    cell += f", x {base['tokens_per_s'] / row['tokens_per_s']:.2f}"
            cells.append(cell)
        table.append(cells)
    lines = _table(["system", *(f"n={size}" for size in sizes)], table)
    extra = []
    for row in rows:
        if row["n"] == 1 and "decode_seconds" in row:
            cells = [row["system"], f"{row['prefill_seconds'] * 1e3:.0f}", f"{1 / row['decode_seconds']:.1f}"]
            base = by_place.get((first, 1), {})
            ratio = row["decode_seconds"] / base["decode_seconds"] if "decode_seconds" in base else 1.0
            extra.append([*cells, "" if row["system"] == first else f"x {ratio:.2f}"])
        if "ttft_ms" in row:
            extra.append(
                [f"{row['system']}, n={row['n']}", f"{row['ttft_ms']:.0f}", f"{row['itl_ms']:.2f}", ""]
            )
    if extra and own_served:
        extra = [each[:3] for each in extra if "n=" in each[0]]
        lines += ["", *_table(["", "median TTFT, ms", "median gap between tokens, ms"], extra)]
    elif extra:
        lines += ["", *_table(["n = 1", "first token, ms", "then decode, tok/s", ""], extra)]
    return lines


def _floors(found: dict[str, Any], rows: list[dict[str, Any]], peaks: dict[str, float]) -> list[str]:
    lines = [
        f"A decode step reads {found['weight_bytes'] / 1e6:.1f} MB of weights. A plain read of them in the "
        f"same process: {found['read_gb_per_s']:.1f} GB/s warm, {found['cold_read_gb_per_s']:.1f} cold."
    ]
    floor = found["weight_bytes"] / found["read_gb_per_s"] / 1e6
    for row in rows:
        if row["system"] == "aserve" and row["n"] == 1 and "decode_seconds" in row:
            whole = row["decode_seconds"] * 1e3
            lines.append(
                f"Batch 1 in the whole engine: {whole:.2f} ms a token, the read alone {floor:.2f} ms: "
                f"**{floor / whole:.0%} of the plain read** ({whole / floor:.2f} times the floor)."
            )
    lines.append(
        f"Cold, caches walked before each step: {found['cold_step_ms']:.2f} ms in the worker, the read "
        f"{found['cold_floor_ms']:.2f} ms ({found['cold_floor_ms'] / found['cold_step_ms']:.0%})."
    )
    names = [name for name, rate in peaks.items() if rate]
    table = []
    for step in found["steps"]:
        cells = [
            f"decode, batch {step['n']}",
            f"{step['step_ms']:.2f}",
            f"{step['read_floor_ms'] / step['step_ms']:.0%}",
        ]
        table.append(cells + [_share(step["gop"], step["step_ms"], peaks[name]) for name in names])
    if "prefill" in found:
        prefill = found["prefill"]
        cells = [f"prefill of {prefill['tokens']}, whole engine", f"{prefill['ms']:.1f}", ""]
        table.append(cells + [_share(prefill["gop"], prefill["ms"], peaks[name]) for name in names])
    header = ["step in the worker", "ms", "share of plain read", *(f"share of {name} peak" for name in names)]
    lines += ["", *_table(header, table), ""]
    lines.append(
        f"Prefill of 16 prompts at once: {found['prefill_ms_per_token']:.3f} ms a token. "
        f"Waiting costs {found['idle_cpu_seconds'] * 1e3:.1f} ms of CPU a second."
    )
    return lines


def _share(gop: float, milliseconds: float, peak: float) -> str:
    return f"{gop / (milliseconds / 1e3) / peak:.0%}"


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/bench")
    text = render(folder)
    (folder / "report.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
