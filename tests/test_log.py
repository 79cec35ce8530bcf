from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import pytest

from aserve import log
from aserve.errors import ConfigError
from aserve.messages.params import SamplingParams


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """aserve's logger as if never set up, and a call that returns what it has written since."""
    log.logger.handlers = []
    return lambda: capsys.readouterr().err


def test_level_comes_from_argument_then_environment(
    written: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASERVE_LOGGING_LEVEL", "warning")
    assert log.setup().level == logging.WARNING
    assert log.setup("debug").level == logging.DEBUG
    assert log.setup("trace").level == logging.DEBUG
    monkeypatch.delenv("ASERVE_LOGGING_LEVEL")
    assert log.setup().level == logging.INFO


def test_unknown_level_is_refused(written: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASERVE_LOGGING_LEVEL", "loud")
    with pytest.raises(ConfigError, match="loud"):
        log.setup()


def test_setting_up_twice_writes_once(written: Callable[[], str]) -> None:
    log.setup()
    log.setup()
    logging.getLogger("aserve.engine").info("started")
    assert written().count("started") == 1


def test_a_record_is_one_line_whatever_it_holds(written: Callable[[], str]) -> None:
    log.setup()
    hostile = "a\nINFO forged\r\x1b[2J\u2028b\x00\u202e"
    log.logger.info("got %s", hostile)
    lines = written().splitlines()
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert "a\\nINFO forged" in lines[0]


def test_a_traceback_cannot_forge_a_record(written: Callable[[], str]) -> None:
    # Another program's handler comes first and keeps its traceback in the record.
    other = logging.StreamHandler(io.StringIO())
    other.setFormatter(logging.Formatter())
    log.logger.addHandler(other)
    log.setup()
    try:
        raise ValueError("bad\nINFO 01-01 00:00:00 aserve: all is well")
    except ValueError:
        log.logger.exception("request failed")
    lines = written().splitlines()
    assert lines[0].startswith("ERROR ")
    assert len(lines) > 3
    assert all(line.startswith("    ") for line in lines[1:])
    assert any("all is well" in line for line in lines[1:])


@pytest.mark.parametrize(
    ("limit", "text", "ids"),
    [(None, "'abcdef'", "[1, 2, 3]"), (2, "'ab'", "[1, 2]"), (0, "''", "[]"), (99, "'abcdef'", "[1, 2, 3]")],
)
def test_shorten(limit: int | None, text: str, ids: str) -> None:
    assert log.shorten("abcdef", limit) == text
    assert log.shorten([1, 2, 3], limit) == ids
    assert log.shorten(None, limit) == "None"


FACTS: dict[str, Any] = {
    "id": "r\n1", "seconds": 0.5, "queue_seconds": 0.25, "first_token_seconds": None,
    "prompt_tokens": 4, "cached_tokens": 3, "generated_tokens": 2,
}  # fmt: skip


def test_request_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log.logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="aserve")
    requests = log.RequestLog(max_log_len=3)
    requests.accepted("r\n1", prompt="a\nbcd", prompt_token_ids=[5, 6, 7, 8], params={"n": 1})
    requests.ended("stop,length", FACTS)
    requests.ended("aborted: client\ngone", FACTS)
    accepted, finished, aborted = (record.getMessage() for record in caplog.records)
    assert "r\\n1" in accepted and "'a\\nb'" in accepted and "[5, 6, 7]" in accepted and "8" not in accepted
    assert finished == (
        "ended r\\n1: stop,length; 4 prompt (3 cached) + 2 generated tokens; queued 0.250 s, total 0.500 s"
    )
    assert "aborted: client\\ngone;" in aborted
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_by_default_nothing_of_what_is_said_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log.logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="aserve")
    params = SamplingParams(max_tokens=9, stop=["secret"])
    log.RequestLog().accepted("r", prompt="secret", prompt_token_ids=[77, 78], params=params)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == "accepted r: 2 prompt tokens, max_tokens 9, n 1, best_of 1, temperature 1.0"


def test_disabled_request_log_is_silent(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log.logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="aserve")
    requests = log.RequestLog(enabled=False)
    requests.accepted("r", prompt="x", prompt_token_ids=[1], params=None)
    requests.ended("stop", FACTS)
    assert caplog.records == []


def test_negative_max_log_len_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_log_len"):
        log.RequestLog(max_log_len=-1)
