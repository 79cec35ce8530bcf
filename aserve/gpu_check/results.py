"""The results file: one line of JSON for each finding, written the moment it is known."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from aserve.errors import ConfigError

Row = dict[str, Any]


class Results:
    """Appends to a file. Every row also says where and when: device, capability, date, sources, commit.

    Rows of a dry run are of kinds of their own ("dry correctness"), so none is ever taken for a GPU's.
    ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path, about: Row, dry: bool) -> None:
        self.rows: list[Row] = []
        self.path = path
        self._about, self._dry = about, dry
        self._started = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}", param="output") from None

    def put(self, row: Row) -> None:
        """Adds a row; it is on disk when this returns."""
        kind = f"dry {row['kind']}" if self._dry else row["kind"]
        whole = {**row, "kind": kind, **self._about, "t": round(time.monotonic() - self._started, 1)}
        self._file.write(json.dumps(_finite(whole), allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(row)

    def of(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list) else value
