"""The sampler's work with one row's failure kept to that row.

What is wrong with a request shows where its row is worked on. The forward pass is common to all rows, and
its failure is the engine's; everything here is a single row's affair, and must stay so: a row that fails
is reported in ``failed``, which ends its request, and the others draw what they would have drawn without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from aserve.messages.params import SamplingParams
from aserve.messages.step import Fork, NewSequence, SampleLogprobs, StepPlan
from aserve.sampling.sampler import Sampled, SamplerState

logger = logging.getLogger(__name__)


class ContainedRows:
    """A sampler state whose slots fail one by one.

    broken: why a slot's request is to fail when it next draws; until the slot is given to another.
    """

    def __init__(self, sampler: SamplerState) -> None:
        self.sampler = sampler
        self.broken: dict[int, str] = {}

    def begin(self, plan: StepPlan) -> None:
        """Takes in who is new to a plan's slots, and what has been chosen for them since the last one."""
        for new in plan.new:
            self.add(new)
        for fork in plan.forks:
            self.fork(fork)
        for slot, position, token_id in plan.chosen:
            self.choose(slot, position, token_id)

    def add(self, new: NewSequence) -> None:
        """Gives a slot to a sequence; one that cannot be prepared fails at its first draw."""
        cut = new.num_prompt_tokens
        prompt, output = new.token_ids[:cut], new.token_ids[cut:]
        self.broken.pop(new.slot, None)
        try:
            self.sampler.add(
                new.slot,
                new.params,
                new.rng_seed,
                prompt,
                output,
                new.eos_token_id,
                new.grammar,
                new.candidates,
            )
        except Exception as error:
            self._breaks(new.slot, "preparing its sampling parameters", error)
            # The slot must hold something that rows can be drawn for.
            self.sampler.add(new.slot, SamplingParams(), new.rng_seed, [], [], None)

    def fork(self, fork: Fork) -> None:
        self.broken.pop(fork.slot, None)
        try:
            self.sampler.fork(fork.slot, fork.parent_slot, fork.rng_seed)
        except Exception as error:
            self._breaks(fork.slot, "copying its sampling state", error)
            self.sampler.add(fork.slot, SamplingParams(), fork.rng_seed, [], [], None)
        if fork.parent_slot in self.broken:
            self.broken[fork.slot] = self.broken[fork.parent_slot]

    def choose(self, slot: int, position: int, token_id: int) -> None:
        """Tells which token a slot that reports candidates goes on with."""
        try:
            self.sampler.choose(slot, position, token_id)
        except Exception as error:
            self._breaks(slot, "counting its tokens", error)

    def sample(self, compute: Callable[[], torch.Tensor], rows: list[int], slots: list[int]) -> Sampled:
        """As :meth:`SamplerState.sample`; ``compute`` makes the logits, float32 ``[R, V]``."""
        try:
            sampled = self.sampler.sample(compute(), rows, slots)
        except Exception as error:
            logger.error("drawing failed; every row is drawn by itself", exc_info=error)
            sampled = self._one_by_one(compute(), rows, slots)
        if self.broken:
            for i, slot in enumerate(slots):
                if slot in self.broken:
                    sampled.failed.setdefault(i, self.broken[slot])
        return sampled

    def take_likeliest(
        self, slots: list[int], token_ids: list[int], logprobs: list[float], logits: torch.Tensor
    ) -> tuple[dict[int, str], bool]:
        """As :meth:`SamplerState.take_likeliest`, but rows with a guide, all of one step, draw again from
        their logits. Also tells whether there were any: their ``token_ids`` may have changed.
        """
        guided = self.sampler.guided(slots)
        if not guided:
            return self.sampler.take_likeliest(slots, token_ids, logprobs, logits), False
        failed: dict[int, str] = {}
        plain = sorted(set(range(len(slots))).difference(guided))
        if plain:
            ids, own = [token_ids[i] for i in plain], [logprobs[i] for i in plain]
            found = self.sampler.take_likeliest([slots[i] for i in plain], ids, own, logits[plain])
            _put(plain, token_ids, ids, logprobs, own, failed, found)
        part = logits[guided] if plain else logits
        chosen = [slots[i] for i in guided]
        ids, own = [token_ids[i] for i in guided], [logprobs[i] for i in guided]
        try:
            drawn = self.sampler.take_guided(part, chosen, ids, own)
        except Exception as error:
            logger.error("matching failed; every row is drawn by itself", exc_info=error)
            drawn = self._one_by_one(part, list(range(len(chosen))), chosen)
        ids, own = drawn.token_ids.tolist(), drawn.logprobs.tolist()
        _put(guided, token_ids, ids, logprobs, own, failed, drawn.failed)
        return failed, True

    def prompt_logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor, slot: int
    ) -> list[SampleLogprobs]:
        """As :meth:`SamplerState.prompt_logprobs`; nothing for a slot that has failed."""
        if slot in self.broken:
            return []
        try:
            return self.sampler.prompt_logprobs(logits, token_ids, slot)
        except Exception as error:
            self._breaks(slot, "the log-probabilities of its prompt", error)
            return []

    def _one_by_one(self, logits: torch.Tensor, rows: list[int], slots: list[int]) -> Sampled:
        """What :meth:`sample` gives, made of a call for each row; a row does not depend on its batch."""
        count = len(slots)
        merged = Sampled(
            torch.zeros(count, dtype=torch.int64, device=logits.device),
            torch.zeros(count, dtype=torch.float32, device=logits.device),
        )
        for i, (row, slot) in enumerate(zip(rows, slots, strict=True)):
            try:
                one = self.sampler.sample(logits[row : row + 1].clone(), [0], [slot])
            except Exception as error:
                merged.failed[i] = _reason("drawing its token", error)
                continue
            merged.token_ids[i], merged.logprobs[i] = one.token_ids[0], one.logprobs[0]
            merged.details.update((i, entry) for entry in one.details.values())
            merged.failed.update((i, reason) for reason in one.failed.values())
        return merged

    def _breaks(self, slot: int, what: str, error: Exception) -> None:
        logger.error("a request failed: %s", what, exc_info=error)
        self.broken[slot] = _reason(what, error)


def _put(
    places: list[int],
    token_ids: list[int],
    ids: list[int],
    logprobs: list[float],
    own: list[float],
    failed: dict[int, str],
    reasons: dict[int, str],
) -> None:
    """Writes what some rows drew to their places among all."""
    for place, token_id, logprob in zip(places, ids, own, strict=True):
        token_ids[place], logprobs[place] = token_id, logprob
    failed.update((places[i], reason) for i, reason in reasons.items())


def _reason(what: str, error: Exception) -> str:
    # The error's own text stays in the log: it may say anything.
    return f"{what} failed ({type(error).__name__})"
