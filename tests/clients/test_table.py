"""The table of clients says what was found, by these very programs with these very versions."""

from __future__ import annotations

import re

import pytest

from tests.clients.table import (
    MARKS,
    PROGRAMS,
    README,
    ROOT,
    ROWS,
    Row,
    digest,
    named_checks,
    pinned,
    read,
    render,
)


def test_the_page_holds_the_results() -> None:
    match = MARKS.search(README.read_text(encoding="utf-8"))
    assert match is not None
    assert match[0] == match[1] + render(read()) + match[2], "run `make clients`"
    assert "tests/clients/README.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_program_is_a_row() -> None:
    programs = {path.name for path in PROGRAMS.iterdir() if path.is_file()} - {"kit.py", "kit.mjs"}
    assert programs == {row.program for row in ROWS} == read().keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.program)
def test_a_result_is_of_the_program_and_the_versions_there_are(row: Row) -> None:
    result = read()[row.program]
    assert result["digest"] == digest(row), "the program has changed since: run `make clients`"
    assert [check["what"] for check in result["checks"]] == named_checks(row) != []
    pins = pinned(row)
    for package, version in result["versions"].items():
        assert package == "curl" or pins[package] == version, package
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.program)
def test_what_works_goes_on_working(row: Row) -> None:
    assert [check for check in read()[row.program]["checks"] if check["error"] is not None] == []
