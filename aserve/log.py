"""Logging: one logger tree ``aserve``, one line per record, and the three lines a request leaves.

Nothing a client sends may forge a log line, so every record is written as a single line with its
unprintable characters escaped, and every line of a traceback is indented.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from aserve.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error", "critical")
LEVEL_VARIABLE = "ASERVE_LOGGING_LEVEL"

logger = logging.getLogger("aserve")


def escape(text: str) -> str:
    """``text`` on one line: unprintable characters (line ends, terminal codes, direction marks) escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class LineFormatter(logging.Formatter):
    """One line per record; tracebacks follow, indented."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(asctime)s %(name)s: %(message)s", "%m-%d %H:%M:%S")
        self._second = (-1, "")

    def format(self, record: logging.LogRecord) -> str:
        # Not the base class's: it reuses the traceback that any handler before it left in the record.
        record.message = record.getMessage()
        second = int(record.created)
        if self._second[0] != second:
            self._second = second, self.formatTime(record, self.datefmt)
        record.asctime = self._second[1]
        lines = [escape(self.formatMessage(record))]
        if record.exc_info:
            lines += self._indented(self.formatException(record.exc_info))
        if record.stack_info:
            lines += self._indented(self.formatStack(record.stack_info))
        return "\n".join(lines)

    @staticmethod
    def _indented(text: str) -> list[str]:
        return ["    " + escape(line) for line in text.split("\n")]


def resolve_level(name: str) -> int:
    """Number of a level name, any case; ``trace`` counts as ``debug``. Raises ConfigError for others."""
    lowered = name.strip().lower()
    if lowered == "trace":
        lowered = "debug"
    if lowered not in LEVELS:
        raise ConfigError(f"unknown log level {name!r}; known: {', '.join(LEVELS)}")
    return int(getattr(logging, lowered.upper()))


def setup(level: str | None = None) -> logging.Logger:
    """Send aserve's records to standard error and return the logger.

    ``level`` wins over the environment variable ASERVE_LOGGING_LEVEL; the default is ``info``. Called
    by the command line and by ``aserve.app``; a program that uses aserve as a library configures
    logging itself. Calling it again only changes the level.
    """
    logger.setLevel(resolve_level(level or os.environ.get(LEVEL_VARIABLE) or "info"))
    if not any(isinstance(handler.formatter, LineFormatter) for handler in logger.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LineFormatter())
        logger.addHandler(handler)
        logger.propagate = False
    return logger


def shorten(value: str | Sequence[int] | None, limit: int | None) -> str:
    """``value`` as it appears in the log: its first ``limit`` characters or ids (0: none, None: all).

    Text comes back quoted and on one line.
    """
    if value is None:
        return "None"
    if isinstance(value, str):
        return repr(value if limit is None else value[:limit])
    return str(list(value if limit is None else value[:limit]))


class RequestLog:
    """One INFO line when a request is accepted and one when it ends, with the cause, whatever ends it.

    enabled: False silences all of them (``--disable-log-requests``).
    max_log_len: characters of prompt text and number of prompt ids shown, besides all parameters. None,
        the default, shows nothing of what a request says: counts and times only.
    """

    def __init__(self, *, enabled: bool = True, max_log_len: int | None = None) -> None:
        if max_log_len is not None and max_log_len < 0:
            raise ConfigError(f"max_log_len must be at least 0, got {max_log_len}")
        self.enabled = enabled
        self.max_log_len = max_log_len
        self._logger = logging.getLogger("aserve.requests")

    @property
    def active(self) -> bool:
        """Whether lines are written at all."""
        return self.enabled and self._logger.isEnabledFor(logging.INFO)

    def accepted(
        self,
        request_id: str,
        *,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: object,
        lora_request: object = None,
    ) -> None:
        if not self.active:
            return
        if self.max_log_len is None:
            asked = [f"{name} {getattr(params, name)}" for name in _ASKED if hasattr(params, name)]
            self._write(
                "accepted %s: %s",
                escape(request_id),
                ", ".join([f"{len(prompt_token_ids)} prompt tokens", *asked]),
            )
            return
        self._write(
            "accepted %s: prompt: %s, params: %s, prompt_token_ids: %s, lora_request: %s",
            escape(request_id),
            shorten(prompt, self.max_log_len),
            escape(repr(params)),
            shorten(prompt_token_ids, self.max_log_len),
            escape(repr(lora_request)),
        )

    def ended(self, cause: str, facts: Mapping[str, Any]) -> None:
        """cause: such as ``stop`` or ``aborted: disconnect``. facts: as ``engine.report`` makes them."""
        if not self.active:
            return
        times = (("queued", "queue_seconds"), ("first token", "first_token_seconds"), ("total", "seconds"))
        shown = [f"{name} {facts[key]:.3f} s" for name, key in times if facts[key] is not None]
        self._write(
            "ended %s: %s; %d prompt (%d cached) + %d generated tokens; %s",
            escape(facts["id"]),
            escape(cause),
            facts["prompt_tokens"],
            facts["cached_tokens"],
            facts["generated_tokens"],
            ", ".join(shown),
        )

    def _write(self, message: str, *args: Any) -> None:
        # Logger.info would look through the stack for its caller, which no line shows.
        self._logger.handle(
            logging.LogRecord(self._logger.name, logging.INFO, __file__, 0, message, args, None)
        )


_ASKED = ("max_tokens", "n", "best_of", "temperature")
