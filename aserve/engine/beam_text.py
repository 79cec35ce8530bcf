"""Stop strings in the texts of beams, which have to be found before it is known which beams go on."""

from __future__ import annotations

import logging
from collections.abc import Callable

from aserve.core.sequence import Sequence
from aserve.errors import RequestFailedError
from aserve.messages.params import SamplingParams
from aserve.tokenizer.detokenizer import Detokenizer
from aserve.tokenizer.stop import StopChecker

logger = logging.getLogger(__name__)

Text = tuple[Detokenizer, StopChecker]


class BeamTexts:
    """The texts of one request's running beams.

    detokenizer: makes that of an output without tokens.
    """

    def __init__(self, detokenizer: Callable[[], Detokenizer], params: SamplingParams) -> None:
        self._detokenizer = detokenizer
        self._stop = StopChecker(list(params.stop or ()), params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._texts: dict[Sequence, Text] = {}
        self._tried: dict[tuple[Sequence, int], Text] = {}

    def look(self, beam: Sequence, token_id: int) -> str | None:
        """The stop string that a beam's text has once this token follows."""
        try:
            text = self._texts.get(beam)
            detokenizer = text[0].fork() if text else self._detokenizer()
            stop = (text[1] if text else self._stop).fork()
            delta = detokenizer.push(token_id)
            self._tried[beam, token_id] = detokenizer, stop
            return stop.feed(delta, searching=beam.num_output_tokens + 1 >= self._min_tokens)
        except Exception as error:
            logger.error("request %s: making its text failed", beam.group.request_id, exc_info=error)
            raise RequestFailedError(f"making its text failed ({type(error).__name__})") from error

    def follow(self, taken: list[tuple[Sequence, Sequence, int]]) -> None:
        """The running beams are these now: ``(beam, the one it came from, its new token)``."""
        self._texts = {beam: self._tried[parent, token_id] for beam, parent, token_id in taken}
        self._tried = {}
