"""A plan in the making, and what is remembered about it until its result comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass

from aserve.core.block_manager import Growth
from aserve.core.block_pool import NULL_BLOCK
from aserve.core.sequence import Sequence
from aserve.messages.step import Fork, NewSequence, StepPlan

Row = tuple[Sequence, int, int]
"""A sequence, its first token to compute, and how many. A plain tuple: a step has hundreds."""


@dataclass(slots=True)
class Ticket:
    """The sequences of a plan, parallel to its rows and its samples; those of beams come last."""

    rows: list[Sequence]
    samples: list[Sequence]
    beams: list[Sequence]
    started: float
    prefilled: bool
    prompt_tokens: int
    """Tokens of prompts this step takes care of, those found in the prefix cache included."""


class PlanBuilder:
    """Collects rows under a token budget.

    budget, prompt_budget: tokens that rows may still have, and those that rows of several may.
    prefills, decodes: rows of several tokens and of one; a plan has the former first, each in the order
        they were added in.
    prompt_tokens: tokens of prompts that the rows compute.
    blocks_promised: blocks that sequences admitted in this step will need but have not taken yet.
    cached_tokens: prompt tokens found in the prefix cache by requests that start in this step.
    max_steps, seconds: as in :class:`StepPlan`.
    """

    __slots__ = (
        "blocks_promised",
        "budget",
        "cached_tokens",
        "copies",
        "decodes",
        "grown",
        "max_steps",
        "prefills",
        "prompt_budget",
        "prompt_tokens",
        "replaced",
        "seconds",
        "swap_ins",
    )

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.prompt_budget = math.inf
        self.blocks_promised = 0
        self.prefills: list[Row] = []
        self.decodes: list[Row] = []
        self.prompt_tokens = 0
        self.grown: list[tuple[Sequence, list[int]]] = []
        self.replaced: list[tuple[int, int, int]] = []
        self.copies: list[tuple[int, int]] = []
        self.swap_ins: list[tuple[int, int]] = []
        self.cached_tokens = 0
        self.max_steps = 1
        self.seconds = math.inf

    def add_row(self, seq: Sequence, count: int, growth: Growth) -> None:
        self.budget -= count
        if count > 1:
            self.prompt_budget -= count
        start = seq.num_computed
        if count > 1 or start < seq.num_prompt_tokens:
            self.prompt_tokens += count
        (self.prefills if count > 1 else self.decodes).append((seq, start, count))
        self.add_growth(seq, growth)

    def add_growth(self, seq: Sequence, growth: Growth) -> None:
        if growth.taken:
            self.grown.append((seq, growth.taken))
        if growth.split is not None:
            index, source, copy = growth.split
            self.replaced.append((seq.slot, index, copy))
            self.copies.append((source, copy))

    @property
    def empty(self) -> bool:
        return not self.decodes and not self.prefills

    def build(
        self,
        step_id: int,
        now: float,
        rows: list[Row],
        samples: list[tuple[int, Sequence]],
        beams: list[tuple[int, Sequence]],
        unsent: list[Sequence],
        forks: list[Fork],
        chosen: list[tuple[int, int, int]],
        swap_outs: list[tuple[int, int]],
    ) -> StepPlan:
        """rows: prefills, then decodes. samples, beams: ``(row, sequence)`` to draw for. unsent: sequences
        the worker does not know yet."""
        # Unsent sequences and forks are described whole: their tables need no growth entries of their own.
        fresh = {seq.slot: seq for seq in unsent if seq.slot >= 0}
        whole = fresh.keys() | {fork.slot for fork in forks} if forks else fresh
        prefills = len(self.prefills)
        return StepPlan(
            step_id=step_id,
            slots=[seq.slot for seq, _, _ in rows],
            starts=[start for _, start, _ in rows],
            counts=[count for _, _, count in rows],
            samples=[(row, seq.slot) for row, seq in (samples + beams if beams else samples)],
            new=[describe(seq) for seq in fresh.values()],
            forks=forks,
            chosen=chosen,
            new_blocks=[(seq.slot, taken) for seq, taken in self.grown if seq.slot not in whole],
            replaced_blocks=self.replaced,
            swap_outs=swap_outs,
            swap_ins=self.swap_ins,
            block_copies=self.copies,
            num_prefill_rows=prefills,
            max_steps=self.max_steps,
            seconds=self.seconds,
            ticket=Ticket(
                rows=[seq for seq, _, _ in rows],
                samples=[seq for _, seq in samples],
                beams=[seq for _, seq in beams],
                started=now,
                prefilled=prefills > 0,
                prompt_tokens=self.prompt_tokens + self.cached_tokens,
            ),
        )


def describe(seq: Sequence) -> NewSequence:
    """Everything a worker needs to know about a sequence it has not seen."""
    group = seq.group
    return NewSequence(
        slot=seq.slot,
        seq_id=seq.seq_id,
        token_ids=list(seq.token_ids),
        num_prompt_tokens=seq.num_prompt_tokens,
        block_ids=_block_ids(seq),
        params=group.params,
        rng_seed=seq.rng_seed,
        eos_token_id=group.eos_token_id,
        grammar=group.grammar,
        want_prompt_logprobs=group.wants_prompt_logprobs,
        pooled=group.pooling is not None,
        candidates=0 if group.beam is None else group.beam.search.num_candidates,
    )


def _block_ids(seq: Sequence) -> list[int]:
    # Attention never looks at what is outside the window: there, any block that exists will do.
    return [0 if block == NULL_BLOCK else block for block in seq.blocks]


def describe_fork(child: Sequence, parent: Sequence) -> Fork:
    return Fork(
        slot=child.slot,
        seq_id=child.seq_id,
        parent_slot=parent.slot,
        num_tokens=len(child.token_ids),
        block_ids=_block_ids(child),
        rng_seed=child.rng_seed,
    )
