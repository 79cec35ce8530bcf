"""The README holds what the code says today."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from aserve.config.table import render

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_of_arguments_are_current() -> None:
    found = re.search(r"<!-- arguments: [^>]*-->\n(.*)<!-- end of arguments -->", README, re.DOTALL)
    assert found is not None
    assert found[1] == render(), "run `make readme`"


def test_python_blocks_parse() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        ast.parse(block)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
