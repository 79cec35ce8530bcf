"""Where a batch comes from and goes to: files, or addresses that are fetched and put."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from aserve.errors import ConfigError

TIMEOUT_SECONDS = 60.0
"""How long the other side may be silent."""


@contextlib.contextmanager
def source(place: str) -> Iterator[IO[bytes]]:
    """The bytes at ``place``. ConfigError if they cannot be had."""
    if not _is_address(place):
        try:
            opened = open(place, "rb")  # noqa: SIM115 - closed below, outside of this except
        except OSError as error:
            raise ConfigError(f"input_file: {error}", param="input_file") from error
        with opened:
            yield opened
        return
    with tempfile.TemporaryFile() as copy:
        try:
            with urllib.request.urlopen(place, timeout=TIMEOUT_SECONDS) as answer:
                shutil.copyfileobj(answer, copy)
        except (OSError, ValueError) as error:
            raise _failed(error, place, "input_file") from None
        copy.seek(0)
        yield copy


@contextlib.contextmanager
def target(place: str) -> Iterator[IO[bytes]]:
    """Takes the bytes for ``place``; an address gets them by PUT, at the end, if nothing was raised.

    ConfigError if they cannot be taken there. A file is written as lines come.
    """
    if not _is_address(place):
        try:
            opened = open(place, "wb")  # noqa: SIM115 - closed below, outside of this except
        except OSError as error:
            raise ConfigError(f"output_file: {error}", param="output_file") from error
        with opened:
            yield opened
        return
    with tempfile.TemporaryFile() as copy:
        yield copy
        size = copy.tell()
        copy.seek(0)
        headers = {"Content-Length": str(size), "Content-Type": "application/jsonl"}
        request = urllib.request.Request(place, data=copy, headers=headers, method="PUT")
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()
        except (OSError, ValueError) as error:
            raise _failed(error, place, "output_file") from None


def same(first: str, second: str) -> bool:
    """Whether writing to ``second`` would destroy ``first``."""
    if _is_address(first) or _is_address(second):
        return False
    return Path(first).resolve() == Path(second).resolve()


def _is_address(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _failed(error: Exception, place: str, param: str) -> ConfigError:
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it is the answer, connection and all
    # What follows the path of a signed address is a secret.
    return ConfigError(f"{param}: {place.split('?', 1)[0]}: {error}", param=param)
