"""The Markdown tables of arguments."""

from __future__ import annotations

import subprocess
import sys

from aserve.args import AsyncEngineArgs, ServerArgs
from aserve.config.cli import declared
from aserve.config.table import render

TEXT = render()


def rows() -> dict[str, list[str]]:
    found = {}
    for line in TEXT.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]
            found[cells[0].split("`")[1]] = cells
    return found


def test_one_row_per_argument_of_three_cells() -> None:
    items = declared(ServerArgs) + declared(AsyncEngineArgs)
    assert list(rows()) != [] and set(rows()) == {item.flags[0] for item in items}
    assert len(rows()) == len(items)
    assert all(len(cells) == 3 for cells in rows().values())


def test_cells() -> None:
    table = rows()
    assert table["--tensor-parallel-size"][0] == "`--tensor-parallel-size`, `-tp`"
    assert table["--log-level"][0] == "`--log-level`, `--uvicorn-log-level`"
    assert table["--gpu-memory-utilization"][1] == "0.9"
    assert table["--enforce-eager"][1] == "off"
    assert table["--model"][1] == "smollm2 if its package is installed, else facebook/opt-125m"
    assert "One of `8`, `16`, `32`." in table["--block-size"][2]


def test_refused_arguments_are_marked() -> None:
    table = rows()
    assert table["--enable-lora"][2].endswith("Not built yet.")
    assert table["--lora-modules"][2].endswith("Not built yet.")
    assert table["--kv-cache-dtype"][2].endswith("Not built yet: other than auto.")
    assert "Not built" not in table["--max-num-seqs"][2]


def test_module_prints_it() -> None:
    command = [sys.executable, "-m", "aserve.config.table"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == TEXT
