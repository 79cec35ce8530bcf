"""Draws tokens for the rows of a step."""

from __future__ import annotations

import inspect
import logging
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from aserve import ops
from aserve.messages.params import LogitsProcessor, SamplingParams, SamplingType
from aserve.messages.step import SampleLogprobs
from aserve.sampling.guided import GuidedRows
from aserve.sampling.penalties import PenaltyRows, rates
from aserve.sampling.rng import uniforms
from aserve.sampling.truncation import truncate

logger = logging.getLogger(__name__)

_NONE = float("-inf")
_MASK64 = (1 << 64) - 1

_HOTTEST = float(np.finfo(np.float32).max)
"""Every temperature near this makes all allowed tokens equally likely; an infinite one makes NaN."""

_AT_ONCE = 1 << 18
"""Probabilities that a CPU adds up at a time when drawing: few enough to stay in its cache."""


class Needs:
    """What a slot's rows need besides an argmax. Plain numbers: a flag's arithmetic costs microseconds."""

    DRAW = 1
    TRUNCATION = 2
    PENALTIES = 4
    PROCESSORS = 8
    MIN_TOKENS = 16
    LOGPROBS = 32
    GUIDED = 64
    CANDIDATES = 128


IN_A_PASS = Needs.DRAW | Needs.PENALTIES | Needs.PROCESSORS | Needs.MIN_TOKENS | Needs.GUIDED
"""What rows may need that a device's kernel draws for in one pass over their logits."""


@dataclass(slots=True)
class Sampled:
    """Drawn tokens, int64 ``[S]``, and their log-probabilities, float32 ``[S]``.

    details, failed: as in StepResult, by index into the samples.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    details: dict[int, SampleLogprobs] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Row:
    """The parts of a slot's state that are Python objects."""

    params: SamplingParams
    prompt: list[int]
    output: list[int]
    processors: list[tuple[LogitsProcessor, bool]]
    banned: list[int] | None
    """Tokens that may not be drawn before ``min_tokens``."""
    top: int
    """How many of the likeliest tokens are listed with a drawn one."""


class SamplerState:
    """Sampling parameters and history of every slot.

    The order of operations on a row: logit bias and logits processors, the mask of ``min_tokens``,
    repetition, frequency and presence penalties, temperature, top-k, top-p, min-p, softmax in float32,
    the draw. Tokens that a guide forbids are masked last before the temperature, so that nothing can
    bring them back. Returned log-probabilities come from that softmax; those of a row that needs nothing but
    the likeliest token its guide allows, and reports no others, are the model's own.

    A slot that reports candidates, for beam search, draws the likeliest. Its softmax comes first and is not
    made again, so that what bias, processors, ``min_tokens`` and penalties do to one token's log-probability
    changes no other's: beams are compared by the sums of theirs.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._rows: dict[int, _Row] = {}
        self._penalties = PenaltyRows()
        self._guided = GuidedRows(vocab_size, device)
        self.needs = np.zeros(num_slots, dtype=np.int64)
        self.temperature = np.ones(num_slots, dtype=np.float32)
        self.top_k = np.full(num_slots, vocab_size, dtype=np.int64)
        self.top_p = np.ones(num_slots, dtype=np.float64)
        self.min_p = np.zeros(num_slots, dtype=np.float64)
        self.min_tokens = np.zeros(num_slots, dtype=np.int64)
        self.num_output = np.zeros(num_slots, dtype=np.int64)
        self.seeds = np.zeros(num_slots, dtype=np.uint64)
        self.ends = np.full(num_slots, -1, dtype=np.int64)
        """The token after which each slot's sequence ends, -1 for none."""

    # ---------------------------------------------------------------- slots

    def add(
        self,
        slot: int,
        params: SamplingParams,
        rng_seed: int,
        prompt_token_ids: list[int],
        output_token_ids: list[int],
        eos_token_id: int | None,
        grammar: Any = None,
        candidates: int = 0,
    ) -> None:
        """Gives ``slot`` to a sequence; ``output_token_ids`` is what it had drawn before a preemption.

        grammar: what its output must match (:class:`aserve.guided.base.Grammar`), if anything.
        candidates: how many of the likeliest tokens are to be reported, of which :meth:`choose` names one.
        """
        needs = Needs.CANDIDATES | Needs.LOGPROBS if candidates else 0
        greedy = params.sampling_type in (SamplingType.GREEDY, SamplingType.BEAM)
        if not greedy:
            needs |= Needs.DRAW
        top_k = self.vocab_size if params.top_k < 0 else min(params.top_k, self.vocab_size)
        if top_k < self.vocab_size or params.top_p < 1.0 or params.min_p > 0.0:
            needs |= Needs.TRUNCATION
        penalised = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (
            1,
            0,
            0,
        )
        if penalised:
            needs |= Needs.PENALTIES
            self._penalties.add(slot, params, prompt_token_ids, output_token_ids)
        else:
            self._penalties.drop(slot)
        processors = [(each, _takes_prompt(each)) for each in params.logits_processors or ()]
        if processors or params.logit_bias:
            needs |= Needs.PROCESSORS
        banned = None
        if params.min_tokens:
            ids = {*(params.stop_token_ids or ()), eos_token_id} - {None}
            usable = sorted(i for i in ids if i is not None and 0 <= i < self.vocab_size)
            if usable:
                needs |= Needs.MIN_TOKENS
                banned = usable
        if params.logprobs is not None:
            needs |= Needs.LOGPROBS
        if grammar is not None:
            needs |= Needs.GUIDED
        self._guided.add(slot, grammar, output_token_ids, eos_token_id, params.stop_token_ids or ())
        self._rows[slot] = _Row(
            params,
            prompt_token_ids,
            list(output_token_ids) if processors else [],
            processors,
            banned,
            max(params.logprobs or 0, candidates),
        )
        self.needs[slot] = needs
        self.temperature[slot] = 1.0 if greedy else min(params.temperature, _HOTTEST)
        self.top_k[slot] = top_k
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.min_tokens[slot] = params.min_tokens
        self.num_output[slot] = len(output_token_ids)
        self.seeds[slot] = rng_seed & _MASK64
        self.ends[slot] = -1 if params.ignore_eos or eos_token_id is None else eos_token_id

    def fork(self, slot: int, parent_slot: int, rng_seed: int) -> None:
        """Makes ``slot`` a copy of ``parent_slot``, outputs included, with draws of its own."""
        parent = self._rows[parent_slot]
        self._rows[slot] = _Row(
            parent.params,
            parent.prompt,
            list(parent.output),
            parent.processors,
            parent.banned,
            parent.top,
        )
        self._penalties.fork(slot, parent_slot)
        self._guided.fork(slot, parent_slot)
        for column in (
            self.needs,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.min_tokens,
            self.num_output,
            self.ends,
        ):
            column[slot] = column[parent_slot]
        self.seeds[slot] = rng_seed & _MASK64

    def choose(self, slot: int, position: int, token_id: int) -> None:
        """Names the token that a slot goes on with after it has reported candidates, and its place among
        the tokens of prompt and output."""
        row = self._rows[slot]
        # Not one more: it may have been given the slot anew since it reported, or forked from one that was.
        self.num_output[slot] = position + 1 - len(row.prompt)
        if row.processors:
            row.output.append(token_id)
        if self.needs[slot] & Needs.PENALTIES:
            self._penalties.count(slot, token_id)

    # ---------------------------------------------------------------- drawing

    def sample(self, logits: torch.Tensor, rows: list[int], slots: list[int]) -> Sampled:
        """Draws one token for each slot from its row of ``logits``.

        logits: float32 ``[R, V]``, may be overwritten. rows, slots: parallel, ``[S]``; a row may be named
        more than once. A row whose logits are not finite, or whose processor fails, is reported in
        ``failed`` and does not affect the others.
        """
        index = np.array(slots)
        needs = self.needs[index]
        if rows != list(range(logits.shape[0])):
            logits = logits[torch.tensor(rows, device=logits.device)]
        # How a row is computed must depend on its own needs alone, or its last bits would depend on its
        # neighbours'.
        kinds = np.where(needs == 0, 0, np.where(needs == Needs.GUIDED, 1, 2))
        if ops.samples(logits.device):
            kinds[(kinds == 2) & (needs & ~IN_A_PASS == 0)] = 3
        if kinds.min() == kinds.max():
            sampled = self._draw_rows(kinds[0], logits, needs, slots, index)
        else:
            parts = []
            for kind in np.unique(kinds).tolist():
                among = np.flatnonzero(kinds == kind)
                places = among.tolist()
                chosen = [slots[i] for i in places]
                part = logits[torch.from_numpy(among).to(logits.device)]
                parts.append((places, self._draw_rows(kind, part, needs[among], chosen, index[among])))
            sampled = _merge(len(slots), *parts)
        self._remember(needs, slots, index, sampled)
        return sampled

    def _draw_rows(
        self, kind: int, logits: torch.Tensor, needs: np.ndarray, slots: list[int], index: np.ndarray
    ) -> Sampled:
        """Rows of one kind: 0 needs the likeliest token, 1 the likeliest that its guide allows, 2 more, and 3
        of that only what a device's kernel draws by itself."""
        if kind == 0:
            return _greedy(logits)
        if kind == 1:
            return self._of_guided(logits, slots, *ops.greedy_logprob(logits))
        if kind == 3:
            return self._in_a_pass(logits, needs, slots, index)
        return self._sample(logits, needs, slots, index)

    def _in_a_pass(
        self, logits: torch.Tensor, needs: np.ndarray, slots: list[int], index: np.ndarray
    ) -> Sampled:
        """Rows drawn by a device's kernel; those it finds no token for are drawn by :meth:`_sample`."""
        failed: dict[int, str] = {}
        self._edit(logits, needs, slots, failed)
        drawn = np.where(needs & Needs.DRAW, self.temperature[index], np.float32(0))
        columns = (drawn, self.seeds[index].view(np.int64), self.num_output[index])
        token_ids, logprobs = ops.sample(
            logits, *(torch.from_numpy(each).to(logits.device) for each in columns)
        )
        sampled = Sampled(token_ids, logprobs, failed=failed)
        finite = torch.isfinite(logprobs)
        if not bool(finite.all()):
            places = torch.nonzero(~finite).flatten()
            odd = places.cpu().numpy()
            only_drawn = needs[odd] & Needs.DRAW
            again = self._sample(logits[places], only_drawn, [slots[i] for i in odd.tolist()], index[odd])
            token_ids[places], logprobs[places] = again.token_ids, again.logprobs
            for i, reason in again.failed.items():
                failed.setdefault(int(odd[i]), reason)
        return sampled

    def _of_guided(
        self, logits: torch.Tensor, slots: list[int], token_ids: torch.Tensor, logprobs: torch.Tensor
    ) -> Sampled:
        """Rows that need the likeliest token their guide allows, from the likeliest of all ``[S]``."""
        sampled = _checked(token_ids, logprobs, logits)
        sampled.failed |= self._guided.likeliest(logits, slots, sampled.token_ids, sampled.logprobs)
        # Where the logits of all that is allowed are -inf.
        for i in torch.nonzero(~torch.isfinite(sampled.logprobs)).flatten().tolist():
            sampled.failed.setdefault(i, why_not_finite(_NONE))
            sampled.logprobs[i] = 0.0
        return sampled

    def take_guided(
        self, logits: torch.Tensor, slots: list[int], token_ids: list[int], logprobs: list[float]
    ) -> Sampled:
        """What :meth:`sample` gives for slots that need the likeliest token their guide allows, once the
        likeliest of all are known, ``[S]``. logits: ``[S, V]``."""
        index = np.array(slots)
        sampled = self._of_guided(logits, slots, torch.tensor(token_ids), torch.tensor(logprobs))
        self._remember(self.needs[index], slots, index, sampled)
        return sampled

    def banned(self, slot: int) -> list[int]:
        """Tokens that the slot may not draw before ``min_tokens``."""
        return self._rows[slot].banned or []

    def prompt_length(self, slot: int) -> int:
        return len(self._rows[slot].prompt)

    def penalties(self, slot: int) -> tuple[float, float, float]:
        """Repetition, frequency and presence penalty."""
        return rates(self._rows[slot].params)

    def top(self, slot: int) -> int:
        """How many of the likeliest tokens are listed with one that the slot draws."""
        return self._rows[slot].top

    def only_likeliest(self, slots: list[int]) -> bool:
        """Whether all these slots need is the likeliest token, of those its guide allows if it has one, and
        its log-probability."""
        needs = self.needs[slots]
        return not needs.any() or not (needs & ~Needs.GUIDED).any()

    def guided(self, slots: list[int]) -> list[int]:
        """The places of those among ``slots`` that have a guide."""
        return np.flatnonzero(self.needs[slots] & Needs.GUIDED).tolist() if self._guided.any else []

    def take_likeliest(
        self, slots: list[int], token_ids: list[int], logprobs: list[float], logits: torch.Tensor
    ) -> dict[int, str]:
        """What :meth:`sample` does once the likeliest tokens ``[S]`` and their log-probabilities are known,
        of one step after the other.

        logits: ``[S, V]``, of the last step, looked at for rows whose log-probability is not finite. Those
        are returned with the reason, and their entries replaced.
        """
        self.num_output[slots] += len(token_ids) // len(slots)
        if all(map(math.isfinite, logprobs)):
            return {}
        first = len(token_ids) - len(slots)
        sampled = _checked(torch.tensor(token_ids[first:]), torch.tensor(logprobs[first:]), logits)
        token_ids[first:], logprobs[first:] = sampled.token_ids.tolist(), sampled.logprobs.tolist()
        return {first + index: reason for index, reason in sampled.failed.items()}

    def _sample(
        self, logits: torch.Tensor, needs: np.ndarray, slots: list[int], index: np.ndarray
    ) -> Sampled:
        """Rows that need more than an argmax; ``needs`` and ``index`` are those of ``slots``."""
        failed: dict[int, str] = {}
        every = int(np.bitwise_or.reduce(needs))
        beams = None
        if every & Needs.CANDIDATES:
            beams = torch.from_numpy(np.flatnonzero(needs & Needs.CANDIDATES)).to(logits.device)
            logits[beams] = logits[beams].log_softmax(-1)
        if every & (Needs.PROCESSORS | Needs.MIN_TOKENS | Needs.PENALTIES | Needs.GUIDED):
            self._edit(logits, needs, slots, failed)
        highest, token_ids = logits.max(-1)
        finite = torch.isfinite(highest)
        if not bool(finite.all()):
            for i in torch.nonzero(~finite).flatten().tolist():
                failed.setdefault(i, why_not_finite(float(highest[i])))
                # Any finite row: what is drawn from it is thrown away.
                logits[i], highest[i], token_ids[i] = 0.0, 0.0, 0
        if every & Needs.DRAW:
            _heat(logits, highest, torch.from_numpy(self.temperature[index]).to(logits.device))
        if every & Needs.TRUNCATION:
            picked = np.flatnonzero(needs & Needs.TRUNCATION)
            chosen = index[picked]
            limits = (self.top_k[chosen], self.top_p[chosen], self.min_p[chosen])
            if len(picked) == len(slots):
                truncate(logits, *limits)
            else:
                where = torch.from_numpy(picked).to(logits.device)
                part = logits[where]
                truncate(part, *limits)
                logits[where] = part
        # One row's result is the same alone and in a batch, which a plain sum over a row would not give.
        logprobs = logits.log_softmax(-1)
        if beams is not None:
            logprobs[beams] = logits[beams]
        if every & Needs.DRAW:
            picked = np.flatnonzero(needs & Needs.DRAW)
            chosen = index[picked]
            where = torch.from_numpy(picked).to(logits.device)
            u = torch.from_numpy(uniforms(self.seeds[chosen], self.num_output[chosen])).to(logits.device)
            token_ids[where] = _draw(logits if len(picked) == len(slots) else logits[where], u)
        own = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1)
        details = {}
        if every & Needs.LOGPROBS:
            wanted = np.flatnonzero(needs & Needs.LOGPROBS).tolist()
            counts = [self._rows[slots[i]].top for i in wanted]
            where = torch.tensor(wanted, device=logits.device)
            part = logprobs if len(wanted) == len(slots) else logprobs[where]
            details = dict(zip(wanted, _details(part, token_ids[where], counts), strict=True))
        return Sampled(token_ids, own, details, failed)

    def prompt_logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor, slot: int
    ) -> list[SampleLogprobs]:
        """Log-probabilities of given tokens: logits float32 ``[P, V]``, token_ids int64 ``[P]``.

        Temperature and truncation of the slot apply, penalties and processors do not. The logits may be
        overwritten.
        """
        count = logits.shape[0]
        if self.temperature[slot] != 1.0:
            logits.div_(float(self.temperature[slot]))
        if self.needs[slot] & Needs.TRUNCATION:
            truncate(
                logits,
                np.full(count, self.top_k[slot]),
                np.full(count, self.top_p[slot]),
                np.full(count, self.min_p[slot]),
            )
        top = self._rows[slot].params.prompt_logprobs or 0
        return _details(logits.log_softmax(-1), token_ids, [top] * count)

    # ---------------------------------------------------------------- parts

    def _edit(
        self, logits: torch.Tensor, needs: np.ndarray, slots: list[int], failed: dict[int, str]
    ) -> None:
        """Bias, processors, the mask of min_tokens and penalties, in place."""
        for i in np.flatnonzero(needs & Needs.PROCESSORS).tolist():
            try:
                logits[i] = self._process(logits[i], self._rows[slots[i]])
            except Exception as error:  # whatever a caller's processor does must stay in its own row
                logger.warning("a logits processor failed", exc_info=error)
                failed[i] = f"a logits processor failed ({type(error).__name__}: {error})"
                logits[i] = 0.0
        for i in np.flatnonzero(needs & Needs.MIN_TOKENS).tolist():
            slot = slots[i]
            if self.num_output[slot] < self.min_tokens[slot]:
                logits[i, self._rows[slot].banned] = _NONE
        penalised = np.flatnonzero(needs & Needs.PENALTIES).tolist()
        if penalised:
            self._penalties.apply(logits, penalised, [slots[i] for i in penalised])
        guided = np.flatnonzero(needs & Needs.GUIDED).tolist()
        if guided:
            for i, reason in self._guided.apply(logits, guided, [slots[i] for i in guided]).items():
                failed.setdefault(i, reason)

    def _process(self, row: torch.Tensor, state: _Row) -> torch.Tensor:
        row = row.clone()
        if state.params.logit_bias:
            ids = torch.tensor(list(state.params.logit_bias), device=row.device)
            row[ids] += torch.tensor(list(state.params.logit_bias.values()), device=row.device)
        for processor, takes_prompt in state.processors:
            output = list(state.output)
            result = processor(list(state.prompt), output, row) if takes_prompt else processor(output, row)
            if not isinstance(result, torch.Tensor) or result.shape != row.shape:
                raise TypeError("it must return the row of logits it was given, or one of the same shape")
            row = result.to(torch.float32)
        return row

    def _remember(self, needs: np.ndarray, slots: list[int], index: np.ndarray, sampled: Sampled) -> None:
        self.num_output[index] += 1
        tracked = np.flatnonzero(
            (needs & (Needs.PENALTIES | Needs.PROCESSORS | Needs.GUIDED) != 0)
            & (needs & Needs.CANDIDATES == 0)
        ).tolist()
        if not tracked:
            return
        tokens, wanted = sampled.token_ids.tolist(), needs.tolist()
        for i in tracked:
            if wanted[i] & Needs.GUIDED:
                try:
                    self._guided.advance(slots[i], tokens[i])
                    reason = self._guided.broken(slots[i])
                except Exception as error:  # as below
                    logger.error("a drawn token could not be matched", exc_info=error)
                    reason = f"matching its tokens failed ({type(error).__name__})"
                if reason is not None:
                    sampled.failed.setdefault(i, reason)
            row = self._rows[slots[i]]
            if row.processors:
                row.output.append(tokens[i])
            if wanted[i] & Needs.PENALTIES:
                try:
                    self._penalties.count(slots[i], tokens[i])
                except Exception as error:  # the step is drawn: only this row can be taken back
                    logger.error("a drawn token could not be counted", exc_info=error)
                    sampled.failed.setdefault(i, f"counting its tokens failed ({type(error).__name__})")


def _greedy(logits: torch.Tensor) -> Sampled:
    """The likeliest token of every row."""
    return _checked(*ops.greedy_logprob(logits), logits)


def _checked(token_ids: torch.Tensor, logprobs: torch.Tensor, logits: torch.Tensor) -> Sampled:
    """Likeliest tokens with the rows reported that have none."""
    failed: dict[int, str] = {}
    finite = torch.isfinite(logprobs)
    if not bool(finite.all()):  # of a row with a NaN, a +inf or nothing but -inf
        for i in torch.nonzero(~finite).flatten().tolist():
            failed[i] = why_not_finite(float(logits[i].max()))
            token_ids[i], logprobs[i] = 0, 0.0
    return Sampled(token_ids, logprobs, failed=failed)


def _merge(count: int, *parts: tuple[list[int], Sampled]) -> Sampled:
    """One result of ``count`` rows from those of its parts, each with its rows' places."""
    first = parts[0][1]
    merged = Sampled(first.token_ids.new_empty(count), first.logprobs.new_empty(count))
    for places, part in parts:
        where = torch.tensor(places, device=first.token_ids.device)
        merged.token_ids[where] = part.token_ids
        merged.logprobs[where] = part.logprobs
        merged.details.update((places[i], entry) for i, entry in part.details.items())
        merged.failed.update((places[i], reason) for i, reason in part.failed.items())
    return merged


def _heat(logits: torch.Tensor, highest: torch.Tensor, temperature: torch.Tensor) -> None:
    """Divides rows by their temperatures, in place. ``highest`` is their largest logits, all finite."""
    # A processor may force a token by a logit so large that the quotient would be infinite; such a row is
    # moved first, which changes none of its probabilities.
    shift = torch.where(torch.isinf(highest / temperature), highest, 0.0)
    if bool(shift.any()):
        logits.sub_(shift.unsqueeze(1))
    logits.div_(temperature.unsqueeze(1))


def _draw(scores: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Tokens ``[R]`` at ``u`` (float64 ``[R]``, in [0, 1)) of the cumulative distributions of ``[R, V]``.

    That is the first token whose cumulative probability exceeds ``u``: never one of probability zero.
    """
    drawn = []
    step = max(1, _AT_ONCE // scores.shape[1]) if scores.device.type == "cpu" else len(u)
    for at in range(0, len(u), step):
        cumulative = scores[at : at + step].softmax(-1).cumsum(-1, dtype=torch.float64)
        # Below the last sum even after rounding, because u is at most 1 - 2**-53.
        target = u[at : at + step] * cumulative[:, -1]
        drawn.append(torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1))
    return torch.cat(drawn)


def _details(logprobs: torch.Tensor, token_ids: torch.Tensor, counts: list[int]) -> list[SampleLogprobs]:
    """Rank of the given token ``[R]`` and the ``counts[i]`` likeliest, for each row of ``[R, V]``.

    Tokens that are equally likely are listed by id.
    """
    chosen = logprobs.gather(1, token_ids.unsqueeze(1))
    ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
    own = chosen.squeeze(1).tolist()
    # One more than asked for shows whether the last place is shared.
    width = min(max(counts) + 1, logprobs.shape[1]) if any(counts) else 0
    values, ids = (each.tolist() for each in logprobs.topk(width, dim=-1))
    entries = []
    for i, count in enumerate(counts):
        top = sorted(zip(values[i], ids[i], strict=True), key=lambda entry: (-entry[0], entry[1]))
        if 0 < count < width and values[i][count - 1] == values[i][count]:
            last = values[i][count - 1]
            top = [entry for entry in top if entry[0] > last]
            equal = torch.nonzero(logprobs[i] == last).flatten()[: count - len(top)]
            top += [(last, token_id) for token_id in equal.tolist()]
        top = top[:count]
        entries.append(SampleLogprobs(own[i], ranks[i], [t for _, t in top], [v for v, _ in top]))
    return entries


def _takes_prompt(processor: LogitsProcessor) -> bool:
    """Whether a processor is called with the prompt's ids before the output's: if it needs three arguments.

    Parameters with a default are the processor's own settings, as ``functools.partial`` makes them.
    """
    try:
        parameters = inspect.signature(processor).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in by_position and each.default is each.empty for each in parameters) == 3


def why_not_finite(highest: float) -> str:
    if highest == _NONE:
        return "no token is allowed"
    return "the logits are not finite"
