"""The closing table: what a run found, in at most 9 KB."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from aserve.gpu_check.results import Row

LIMIT = 9000
_FAILURES = 12


def render(about: Row, rows: list[Row], left_out: list[str], dry: bool = False) -> str:
    """The table, its last line "N passed, N failed". The end is kept whole where the rest must be cut."""
    where = f"{about['device']}, capability {'.'.join(map(str, about['capability']))}"
    head = ["DRY RUN: emulated kernels, tiny shapes; no figure says anything of a GPU"] if dry else []
    head += [f"aserve gpu-check on {where}, {about['date']}, commit {about['commit']}"]
    body = [line for part in (_counts, _ceilings, _timings, _end_to_end, _sanitizer) for line in part(rows)]
    end = [*_failures(rows), *_phases(rows)]
    if left_out:
        end.append(f"no time for {len(left_out)}, the first: {left_out[0]}")
    passed = sum(row.get("passed") is True for row in rows)
    failed = sum(row.get("passed") is False for row in rows)
    end.append(f"{passed} passed, {failed} failed")
    room = LIMIT - sum(len(line.encode()) + 1 for line in head + end)
    kept: list[str] = []
    for line in body:
        room -= len(line.encode()) + 1
        if room < 20:
            kept.append("... more in the file")
            break
        kept.append(line)
    return "\n".join([*head, *kept, *end])


def _of(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _counts(rows: list[Row]) -> Iterator[str]:
    for kind, title in (("correctness", "against float64"), ("graph", "graph replays")):
        found = _of(rows, kind)
        if not found:
            continue
        yield f"{title}:"
        for op in dict.fromkeys(row["op"] for row in found):
            mine = [row for row in found if row["op"] == op]
            good = sum(row["passed"] for row in mine)
            worst = max((row.get("off") or 0.0 for row in mine if row["passed"]), default=0.0)
            off = f", at most {worst:.2f} of what is allowed" if kind == "correctness" and good else ""
            yield f"  {op:<20} {good}/{len(mine)} passed{off}"


def _ceilings(rows: list[Row]) -> Iterator[str]:
    for row in _of(rows, "ceiling"):
        if "rate" in row:
            yield f"ceiling: {row['name']}: {row['rate'] / 1e12:.3g}e12"


def _timings(rows: list[Row]) -> Iterator[str]:
    found = [row for row in _of(rows, "timing") if "microseconds" in row]
    if found:
        yield "timings: us, T/s of bytes (B) or flops (F), share of ceiling, times expected, library's us"
    for row in found:
        peers = [each["microseconds"] for each in row["peers"].values() if "microseconds" in each]
        goal = _goal(row)
        unit = "B" if row["bound"] == "bytes" else "F"
        lib = f" lib {min(peers):.1f}" if peers else ""
        rate = f"{row['rate'] / 1e12:.2f}{unit} {_share(row['share_of_ceiling'])}"
        times = f"x{row['ratio_to_expected']:.2f}{lib}{goal}"
        yield f"  {_short(row['name'])}: {row['microseconds']:.1f} us {rate} {times}"


def _goal(row: Row) -> str:
    return {True: " goal met", False: " GOAL MISSED"}.get(row.get("goal_met", ""), "")


def _short(name: str) -> str:
    return name.replace("bfloat16/bfloat16", "bf16").replace("bfloat16", "bf16").replace("float8_", "")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _end_to_end(rows: list[Row]) -> Iterator[str]:
    found = [row for row in _of(rows, "end_to_end") if "what" in row]
    if found:
        yield "end to end:"
    for row in found:
        parts = [f"  {row['name']}: {row['what']}:"]
        if "equal" in row:
            parts.append(f"{row['equal']} of {row['prompts']} equal, {row['ties']} ties")
        for key, text in (("tokens_per_second", "tok/s"), ("step_ms", "ms a step"), ("ttft_ms", "ms TTFT")):
            if key in row:
                parts.append(f"{row[key]:g} {text}")
        if "tpot_ms" in row:
            parts.append(f"{row['tpot_ms']:g} ms TPOT")
        if row.get("share_of_ceiling") is not None:
            parts.append(f"{_share(row['share_of_ceiling'])} of the copy rate{_goal(row)}")
        yield " ".join(parts)


def _sanitizer(rows: list[Row]) -> Iterator[str]:
    for row in _of(rows, "sanitizer"):
        if "skipped" in row:
            yield f"{row['name']}: skipped: {row['skipped']}"
        elif "op" in row:
            yield f"{row['name']} {row['op']}: {'clean' if row['passed'] else 'FAILED'}"


def _failures(rows: list[Row]) -> Iterator[str]:
    bad = [row for row in rows if row.get("passed") is False]
    for row in bad[:_FAILURES]:
        yield f"FAILED {_named(row)}: {_why(row)}"[:240]
    if len(bad) > _FAILURES:
        yield f"and {len(bad) - _FAILURES} more failures in the file"


def _named(row: Row) -> str:
    keys = (
        ("kind", "op", "dtype", "cache_dtype", "shape") if "shape" in row else ("kind", "name", "op", "what")
    )
    return " ".join(str(row[key]) for key in keys if row.get(key))


def _why(row: Row) -> Any:
    if "error" in row:
        return " ".join(str(row["error"]).split())
    skipped = {"kind", "op", "dtype", "cache_dtype", "shape", "name", "what", "passed", "seed"}
    return ", ".join(f"{key} {value}" for key, value in row.items() if key not in skipped)


def _phases(rows: list[Row]) -> Iterator[str]:
    found = _of(rows, "phase")
    parts = [f"{row['name']} {row['seconds']:.0f}" + (" cut" if row["left_out"] else "") for row in found]
    if parts:
        yield "seconds: " + ", ".join(parts)
