"""From drawn tokens to what callers see: text, stop strings, log-probabilities."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from aserve.core.beam_state import unrolled
from aserve.core.scheduler import Commit, Scheduler, TokenUpdate
from aserve.core.sequence import Sequence, SequenceGroup, SequenceStatus
from aserve.engine.beam_text import BeamTexts
from aserve.engine.pooling import embedding_of
from aserve.engine.report import facts
from aserve.engine.stats import EngineStats
from aserve.engine.stream import Mailbox
from aserve.errors import AserveError, InvalidRequestError, RequestFailedError
from aserve.log import RequestLog
from aserve.messages.inputs import OutputKind
from aserve.messages.outputs import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from aserve.messages.step import GUIDE_UNUSABLE, SampleLogprobs
from aserve.tokenizer.detokenizer import Detokenizer
from aserve.tokenizer.stop import StopChecker

if TYPE_CHECKING:
    import numpy as np

    from aserve.messages.params import SamplingParams

logger = logging.getLogger(__name__)

Sink = Callable[[Any], None]
"""Takes a RequestOutput, or the EmbeddingRequestOutput of a pooled request."""


class SequenceText:
    """Text and log-probabilities of one sequence, and how much of them has been handed out."""

    __slots__ = ("detokenizer", "logprobs", "sent_logprobs", "sent_text", "sent_tokens", "stop", "text")

    def __init__(self, detokenizer: Detokenizer | None, stop: StopChecker | None, logprobs: bool) -> None:
        self.detokenizer = detokenizer
        self.stop = stop
        self.text = ""
        self.logprobs: list[TokenLogprobs] | None = [] if logprobs else None
        self.sent_text = 0
        self.sent_tokens = 0
        self.sent_logprobs = 0


class RequestState:
    """A request on its way out.

    whole: it has a single output, at its end: that is asked for, or the best of several are to be found, or
        beams, whose texts are not known before.
    """

    __slots__ = ("group", "kind", "mailbox", "prompt_logprobs_sent", "sink", "texts", "whole")

    def __init__(self, group: SequenceGroup, kind: OutputKind, sink: Sink, mailbox: Mailbox | None) -> None:
        self.group = group
        self.kind = kind
        self.sink = sink
        self.mailbox = mailbox
        self.whole = (
            kind is OutputKind.FINAL_ONLY
            or group.beam is not None
            or (kind is OutputKind.DELTA and group.width != group.params.n)
        )
        self.texts: dict[int, SequenceText] = {}
        self.prompt_logprobs_sent = False


class TokenPieces:
    """Text of single tokens, for the alternatives in log-probabilities; cached per token.

    A token is decoded behind an anchor so that tokenizers that drop a leading space at the start of
    a text do not drop it here.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text = tokenizer.decode(self._anchor)
        self._cache: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        piece = self._cache.get(token_id)
        if piece is None:
            text = self._tokenizer.decode([*self._anchor, token_id])
            piece = text[len(self._anchor_text) :] if text.startswith(self._anchor_text) else text
            self._cache[token_id] = piece
        return piece


class Tracer(Protocol):
    """Is told when requests begin and end."""

    def began(self, request_id: str) -> None:
        """A request was queued, in the task of its caller."""

    def ended(self, cause: str, params: SamplingParams | None, facts: dict[str, Any]) -> None:
        """It has ended, for a ``cause`` as :meth:`aserve.log.RequestLog.ended` takes it. params: None if it
        asked for a vector. facts: as ``engine.report`` makes them, with its ``arrival_time`` and the
        ``finish_reasons`` of its sequences."""


class OutputProcessor:
    """Turns committed steps into outputs.

    ``process`` is the only function that loops over the tokens of a step on the way out: text, stop
    strings, log-probabilities and statistics are all made in that one pass.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: Any | None, stats: EngineStats) -> None:
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._stats = stats
        self._pieces = TokenPieces(tokenizer) if tokenizer is not None else None
        self.states: dict[str, RequestState] = {}
        self.request_log = RequestLog(enabled=False)
        self.tracer: Tracer | None = None

    def set_tokenizer(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._pieces = TokenPieces(tokenizer) if tokenizer is not None else None

    # ---------------------------------------------------------------- requests

    def add(
        self, group: SequenceGroup, kind: OutputKind, sink: Sink, mailbox: Mailbox | None = None
    ) -> RequestState:
        state = RequestState(group, kind, sink, mailbox)
        self.states[group.request_id] = state
        if group.beam is not None and group.params.stop:
            group.beam.watch = BeamTexts(lambda: self._detokenizer(group), group.params)
        return state

    def drop(self, request_id: str) -> RequestState | None:
        """Forgets a request; it gets no further output."""
        return self.states.pop(request_id, None)

    def fail(self, request_id: str, error: AserveError) -> None:
        """Ends a request by an error its caller will see."""
        state = self.states.pop(request_id, None)
        if state is not None and state.mailbox is not None:
            state.mailbox.fail(error)

    def end_without_tokens(self, seq: Sequence) -> None:
        """Tells the caller about a sequence the scheduler ended by itself."""
        state = self.states.get(seq.group.request_id)
        if state is None:
            return
        try:
            if state.group.beam is None:
                self._flush(self._text_of(state, seq), seq)
            else:
                self._write_beams(state)
        except Exception as error:
            self._give_up(state, "making its text", error)
        else:
            self._emit(state, [seq], time.time())

    # ---------------------------------------------------------------- steps

    def process(self, changes: Commit, now: float) -> None:
        states = self.states
        dirty: dict[str, tuple[RequestState, list[Sequence]]] = {}
        # Requests that got their last tokens in one step have waited equally long for these.
        waited: dict[float, int] = {}
        # After several steps a sequence that has ended shows that from its first token on.
        final = None if changes.steps == 1 else {id(update.seq): update for update in changes.tokens}
        for update in changes.tokens:
            seq = update.seq
            group = seq.group
            request_id = group.request_id
            entry = dirty.get(request_id)
            if entry is None:
                state = states.get(request_id)
                if state is None:
                    continue
                dirty[request_id] = state, [seq]
                self._saw_tokens(group, now, waited)
            else:
                state, seqs = entry
                if seqs[-1] is not seq:
                    seqs.append(seq)
            try:
                text = state.texts.get(seq.seq_id) or self._text_of(state, seq)
                self._advance(text, update, final is None or final[id(seq)] is update)
            except Exception as error:  # one request's text must never end the loop for all others
                self._give_up(state, "making its text", error)
        for group in changes.beams:
            if group.request_id in states:
                self._saw_tokens(group, now, waited)
        for last, count in waited.items():
            self._stats.on_output_token((now - last) / changes.steps, count * changes.steps)
        for group, reason in changes.failed:
            failed = states.get(group.request_id)
            if failed is not None:
                self._tell_failed(failed, reason)
        for request_id, (state, seqs) in dirty.items():
            if request_id in states:  # otherwise it has failed
                self._emit(state, seqs, now)
        for group in changes.beams:
            ended = states.get(group.request_id)
            if ended is None or not group.finished:
                continue
            try:
                self._write_beams(ended)
            except Exception as error:
                self._give_up(ended, "making its text", error)
            else:
                self._emit(ended, group.seqs, now)
        for group, vector in changes.pooled:
            pooled = states.get(group.request_id)
            if pooled is not None:
                self._emit_vector(pooled, vector, now)

    def log_end(self, cause: str, group: SequenceGroup) -> None:
        """The one line that every request ends with, and its span."""
        if self.tracer is not None:
            self._trace_end(self.tracer, cause, group)
        if self.request_log.active:
            self.request_log.ended(cause, facts(group, time.time()))

    @staticmethod
    def _trace_end(tracer: Tracer, cause: str, group: SequenceGroup) -> None:
        try:
            tracer.ended(
                cause,
                group.params if group.pooling is None else None,
                facts(group, time.time())
                | {
                    "arrival_time": group.arrival_time,
                    "finish_reasons": [seq.finish_reason for seq in group.seqs if seq.finish_reason],
                },
            )
        except Exception as error:  # a request must not fail for what is only told about it
            logger.error("request %s: its span could not be made", group.request_id, exc_info=error)

    def _give_up(self, state: RequestState, what: str, error: Exception) -> None:
        """Ends one request whose output cannot be made; nobody else's is touched."""
        group = state.group
        logger.error("request %s: %s failed", group.request_id, what, exc_info=error)
        for sibling in group.unfinished:
            self._scheduler.finish(sibling, SequenceStatus.FINISHED_FAILED)
        self._tell_failed(state, f"{what} failed ({type(error).__name__})")

    def _tell_failed(self, state: RequestState, reason: str) -> None:
        self.states.pop(state.group.request_id, None)
        self._stats.on_failed("request")
        self.log_end(f"failed: {reason}", state.group)
        if state.mailbox is not None:
            told = f"the request could not be completed: {reason}"
            guided = state.group.params.guided
            if guided is not None and reason.startswith(GUIDE_UNUSABLE):
                state.mailbox.fail(InvalidRequestError(told, param=guided.param))
            else:
                state.mailbox.fail(RequestFailedError(told))

    def _saw_tokens(self, group: SequenceGroup, now: float, waited: dict[float, int]) -> None:
        """Times of a request that got tokens in a step; ``waited`` as in :meth:`process`."""
        if group.first_token_time is None:
            group.first_token_time = now
            self._stats.on_first_token(now - group.arrival_time)
        else:
            last = group.last_token_time or now
            waited[last] = waited.get(last, 0) + 1
        group.last_token_time = now

    def _text_of(self, state: RequestState, seq: Sequence) -> SequenceText:
        text = state.texts.get(seq.seq_id)
        if text is None:
            params = seq.group.params
            detokenizer = stop = None
            if self._tokenizer is not None and params.detokenize:
                detokenizer = self._detokenizer(seq.group)
                if params.stop:
                    stop = StopChecker(list(params.stop), params.include_stop_str_in_output)
            text = state.texts[seq.seq_id] = SequenceText(detokenizer, stop, params.logprobs is not None)
        return text

    def _detokenizer(self, group: SequenceGroup) -> Detokenizer:
        params = group.params
        return Detokenizer(
            self._tokenizer,
            group.prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )

    def _write_beams(self, state: RequestState) -> None:
        """Makes the texts of the outputs that beams have come to."""
        for seq in self._best(state.group):
            self._write_beam(self._text_of(state, seq), seq)

    def _write_beam(self, text: SequenceText, seq: Sequence) -> None:
        """The text and log-probabilities of a whole output, whose status is known."""
        params = seq.group.params
        trail = seq.group.beam and seq.group.beam.trails.get(seq)
        details = unrolled(trail or None)
        tokens = seq.output_token_ids
        stopped = seq.status is SequenceStatus.FINISHED_STOPPED and not isinstance(seq.stop_reason, str)
        silent = len(tokens) if stopped and not params.include_stop_str_in_output else -1
        for count, token_id in enumerate(tokens, 1):
            delta = ""
            if text.detokenizer is not None and count != silent:
                delta = text.detokenizer.push(token_id)
            if text.logprobs is not None:
                text.logprobs.append(self._logprobs(token_id, details[count - 1], delta))
            if text.stop is None:
                text.text += delta
            elif delta:
                found = text.stop.feed(delta, searching=count >= params.min_tokens)
                text.text = text.stop.text
                if found is not None:
                    return
        self._flush(text, seq)

    def _advance(self, text: SequenceText, update: TokenUpdate, last: bool) -> None:
        """Adds one token's text, looks for stop strings, keeps its log-probabilities.

        last: of its sequence's tokens in the step.
        """
        seq = update.seq
        params = seq.group.params
        delta = ""
        if text.detokenizer is not None:
            by_token = last and seq.status is SequenceStatus.FINISHED_STOPPED
            if not by_token or params.include_stop_str_in_output:
                delta = text.detokenizer.push(update.token_id)
        if text.logprobs is not None and update.details is not None:
            text.logprobs.append(self._logprobs(update.token_id, update.details, delta))
        if text.stop is None:
            text.text += delta
        elif delta:
            found = text.stop.feed(delta, searching=seq.num_output_tokens >= params.min_tokens)
            text.text = text.stop.text
            # A stop string comes before the length limits, but after the tokens that end a sequence.
            if found is not None and seq.status is not SequenceStatus.FINISHED_STOPPED:
                if seq.finished:
                    seq.status, seq.stop_reason = SequenceStatus.FINISHED_STOPPED, found
                else:
                    self._scheduler.finish(seq, SequenceStatus.FINISHED_STOPPED, found)
                return
        if last and seq.status >= SequenceStatus.FINISHED_STOPPED:
            self._flush(text, seq)

    def _flush(self, text: SequenceText, seq: Sequence) -> None:
        """Hands out what was held back, now that the sequence has ended."""
        if text.detokenizer is None:
            return
        rest = text.detokenizer.flush()
        if text.stop is None:
            text.text += rest
        else:
            text.stop.finish(rest)
            text.text = text.stop.text

    def _logprobs(self, token_id: int, details: SampleLogprobs, decoded: str | None) -> TokenLogprobs:
        pieces = self._pieces
        if decoded is None and pieces is not None:
            decoded = pieces[token_id]
        entry: TokenLogprobs = {token_id: Logprob(details.logprob, details.rank, decoded)}
        for rank, (other, logprob) in enumerate(zip(details.top_ids, details.top_logprobs, strict=True), 1):
            if other not in entry:
                entry[other] = Logprob(logprob, rank, pieces[other] if pieces is not None else None)
        return entry

    # ---------------------------------------------------------------- outputs

    def _emit(self, state: RequestState, changed: list[Sequence], now: float) -> None:
        try:
            self._tell(state, changed, now)
        except Exception as error:
            self._give_up(state, "handing its output out", error)

    def _emit_vector(self, state: RequestState, vector: np.ndarray, now: float) -> None:
        group = state.group
        self.states.pop(group.request_id, None)
        try:
            state.sink(embedding_of(group, vector))
        except Exception as error:
            self._give_up(state, "making its vector", error)
        else:
            self._count_finished(group, now)

    def _tell(self, state: RequestState, changed: list[Sequence], now: float) -> None:
        group = state.group
        # Without an ended sequence among those that changed, nothing can have ended now.
        finished = any(seq.status >= SequenceStatus.FINISHED_STOPPED for seq in changed) and group.finished
        if finished:
            self.states.pop(group.request_id, None)
        elif state.whole:
            return
        streamed = state.kind is OutputKind.DELTA and not state.whole
        if streamed:
            outputs = [self._delta(state, seq) for seq in changed]
        else:
            outputs = [self._whole(state, seq) for seq in self._best(group)]
        state.sink(
            RequestOutput(
                group.request_id,
                group.prompt,
                group.prompt_token_ids,
                None if group.params.prompt_logprobs is None else self._prompt_logprobs(state),
                outputs,
                finished,
                # Times are of use at the end; a delta before it goes without.
                self._metrics(group, now if finished else None) if finished or not streamed else None,
                group.lora_request,
                num_cached_tokens=group.num_cached_tokens,
            )
        )
        if finished:
            self._count_finished(group, now)

    @staticmethod
    def _best(group: SequenceGroup) -> list[Sequence]:
        """The ``n`` sequences to return: all of them, or those likeliest as a whole, likeliest first."""
        if group.width == 1:
            return group.seqs
        if group.beam is not None:
            return group.seqs[: group.params.n]
        ranked = sorted(group.seqs, key=lambda seq: seq.cumulative_logprob, reverse=True)
        return ranked[: group.params.n]

    def _whole(self, state: RequestState, seq: Sequence) -> CompletionOutput:
        text = self._text_of(state, seq)
        return CompletionOutput(
            index=seq.index,
            text=text.text,
            token_ids=seq.output_token_ids,
            cumulative_logprob=seq.cumulative_logprob,
            logprobs=list(text.logprobs) if text.logprobs is not None else None,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            lora_request=seq.group.lora_request,
        )

    def _delta(self, state: RequestState, seq: Sequence) -> CompletionOutput:
        text = state.texts.get(seq.seq_id) or self._text_of(state, seq)
        known = len(seq.token_ids)
        first = seq.num_prompt_tokens + text.sent_tokens
        text.sent_tokens = known - seq.num_prompt_tokens
        logprobs = None
        if text.logprobs is not None:
            logprobs = text.logprobs[text.sent_logprobs :]
            text.sent_logprobs = len(text.logprobs)
        if text.stop is None:
            new, text.text = text.text, ""  # nobody looks at the whole again
        else:
            new = text.text[text.sent_text :]
            text.sent_text = len(text.text)
        ended = seq.status >= SequenceStatus.FINISHED_STOPPED
        return CompletionOutput(
            seq.index,
            new,
            seq.token_ids[first:],
            seq.cumulative_logprob,
            logprobs,
            seq.finish_reason if ended else None,
            seq.stop_reason if ended else None,
            seq.group.lora_request,
        )

    def _prompt_logprobs(self, state: RequestState) -> list[TokenLogprobs | None] | None:
        group = state.group
        if group.params.prompt_logprobs is None:
            return None
        if state.kind is OutputKind.DELTA and state.prompt_logprobs_sent:
            return None
        state.prompt_logprobs_sent = True
        entries: list[TokenLogprobs | None] = [None]
        for token_id, details in zip(group.prompt_token_ids[1:], group.prompt_logprobs, strict=False):
            entries.append(self._logprobs(token_id, details, None))
        return entries

    @staticmethod
    def _metrics(group: SequenceGroup, finished_time: float | None) -> RequestMetrics:
        scheduled = group.first_scheduled_time
        return RequestMetrics(
            arrival_time=group.arrival_time,
            last_token_time=group.last_token_time,
            first_scheduled_time=scheduled,
            first_token_time=group.first_token_time,
            time_in_queue=None if scheduled is None else scheduled - group.arrival_time,
            finished_time=finished_time,
        )

    def _count_finished(self, group: SequenceGroup, now: float) -> None:
        if group.seqs[0].status is SequenceStatus.FINISHED_IGNORED:
            self._stats.on_rejected("prompt_too_long")
            self.log_end("prompt too long", group)
            return
        if any(seq.status is SequenceStatus.FINISHED_ABORTED for seq in group.seqs):
            return  # counted by whoever aborted it
        self.log_end(",".join(str(seq.finish_reason) for seq in group.seqs), group)
        if group.first_scheduled_time is not None:
            self._stats.on_scheduled(group.first_scheduled_time - group.arrival_time)
        self._stats.on_finished(
            e2e=now - group.arrival_time,
            prompt_tokens=group.num_prompt_tokens,
            generation_tokens=[seq.num_output_tokens for seq in group.seqs],
            n=group.params.n,
            best_of=group.width,
            finish_reasons=[seq.finish_reason or "" for seq in group.seqs],
        )
