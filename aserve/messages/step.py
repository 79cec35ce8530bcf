"""The two messages between the deciding side and the computing side.

The core decides a :class:`StepPlan`; whoever executes it (a thread, a process, a fake in a test)
answers with a :class:`StepResult`. Both are plain picklable data. Plans are executed strictly in the
order they were submitted, and everything a plan asks for happens in the order of its fields.

A *slot* is a row of the worker's persistent state. It belongs to one sequence from the plan that
names it in ``new`` (or as the destination of a fork) until the core gives it to another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aserve.messages.params import SamplingParams

if TYPE_CHECKING:
    import numpy as np

GUIDE_UNUSABLE = "its guide cannot be followed any further"
"""Begins the reason of a failure that is the fault of the request's own guide."""


@dataclass(slots=True)
class NewSequence:
    """A sequence the worker has not seen, or has forgotten since a preemption.

    token_ids: prompt followed by everything generated so far.
    num_prompt_tokens: how many of them are prompt.
    block_ids: KV blocks for its first tokens; later plans append through ``new_blocks``.
    rng_seed: 64-bit seed of the sequence's draws; the draw for output position ``i`` depends on
        ``(rng_seed, i)`` alone, so batch neighbours and preemption cannot change it.
    pooled: its sample is not a token but the final hidden state at the last position.
    candidates: its sample is not a token but this many of the likeliest, listed in the result's ``details``;
        a later plan says which was ``chosen``. 0 for everything but beams.
    """

    slot: int
    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    block_ids: list[int]
    params: SamplingParams
    rng_seed: int
    eos_token_id: int | None = None
    grammar: Any = None
    """What its output is matched with, a :class:`aserve.guided.base.Grammar`. It lives in one process:
    an executor that sends plans to another compiles ``params.guided`` there."""
    want_prompt_logprobs: bool = True
    pooled: bool = False
    candidates: int = 0


@dataclass(slots=True)
class Fork:
    """A sequence that starts as a copy of another, sharing its KV blocks.

    The parent's tokens are those known to the worker when the fork is applied, ``num_tokens`` of them.
    """

    slot: int
    seq_id: int
    parent_slot: int
    num_tokens: int
    block_ids: list[int]
    rng_seed: int


@dataclass(slots=True)
class StepPlan:
    """One iteration.

    Applied in this order: ``new``, ``forks``, ``chosen``, ``new_blocks``, ``replaced_blocks``, ``swap_outs``,
    ``swap_ins``, ``block_copies``, then the forward pass over the rows, then sampling. Copies may depend
    on those before them in this order; within one list only ``block_copies`` are done one by one.

    slots / starts / counts: row ``i`` computes tokens ``starts[i] : starts[i] + counts[i]`` of the
        sequence in ``slots[i]``. Rows that prefill come before rows that decode.
    samples: ``(row, slot)`` pairs: draw one token for ``slot`` from the last position of ``row``.
        Usually ``slot == slots[row]``; a prompt prefilled once for ``best_of`` sequences names its
        row several times with different slots.
    forks: sequences that begin as copies of others; none is a parent and overwritten by another fork.
    chosen: ``(slot, position, token)``: what was taken of the candidates of a slot, or of the slot that it
        was forked from.
    new_blocks: ``(slot, block ids)`` appended to that slot's table.
    replaced_blocks: ``(slot, index, block id)``: a shared block was split (copy-on-write).
    swap_outs: ``(block, swap block)``: contents to move to host memory; no swap block twice.
    swap_ins: ``(swap block, block)``: contents to move back.
    block_copies: ``(source, destination)`` block ids, copied before the forward pass.
    max_steps: with more than one, forward pass and sampling may be done over again, each time for the tokens
        just drawn: rows compute one token, every row is sampled, and blocks for all steps are there. None is
        begun after a row drew its ``eos_token_id`` or failed, or when it could not be done within
        ``seconds`` of the beginning.
    """

    step_id: int
    slots: list[int]
    starts: list[int]
    counts: list[int]
    samples: list[tuple[int, int]]
    new: list[NewSequence] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    chosen: list[tuple[int, int, int]] = field(default_factory=list)
    new_blocks: list[tuple[int, list[int]]] = field(default_factory=list)
    replaced_blocks: list[tuple[int, int, int]] = field(default_factory=list)
    swap_outs: list[tuple[int, int]] = field(default_factory=list)
    swap_ins: list[tuple[int, int]] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    num_prefill_rows: int = 0
    max_steps: int = 1
    seconds: float = math.inf
    ticket: Any = None
    """Private to the core; never read by an executor and not sent to other processes."""

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


@dataclass(slots=True)
class SampleLogprobs:
    """Log-probabilities asked for at one position. ``top_ids`` is sorted by rank."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True)
class StepResult:
    """What one plan produced; lists are parallel to ``plan.samples``, once over for each of its ``steps``.

    token_ids: the drawn tokens.
    logprobs: log-probability of each drawn token (float32 log-softmax after penalties, temperature
        and truncation).
    details: index into ``samples`` -> ranks and top-k, for sequences that asked for logprobs. For beams
        these are the candidates, or as many as asked for if that is more, and the likeliest is drawn.
    prompt_logprobs: row -> one entry per computed prompt position that predicts a prompt token:
        for tokens ``starts + 1 ..`` of the row, in order.
    pooled: index into ``samples`` -> final hidden state, float32 ``[H]``, for pooled sequences. Their
        ``token_ids`` entry is meaningless.
    failed: index into ``samples`` -> reason, for rows that could not be sampled (NaN logits, a
        logits processor that raised). Their ``token_ids`` entry is meaningless.
    steps: how many were made of the plan's ``max_steps``.
    seconds: what the computation took.
    """

    step_id: int
    token_ids: list[int]
    logprobs: list[float]
    details: dict[int, SampleLogprobs] | None = None
    prompt_logprobs: dict[int, list[SampleLogprobs]] | None = None
    failed: dict[int, str] | None = None
    pooled: dict[int, np.ndarray] | None = None
    steps: int = 1
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class CacheCapacity:
    """What a started executor can hold; learned once, at start.

    num_gpu_blocks: KV blocks on the computing device (also when that device is the CPU).
    num_cpu_blocks: blocks of swap space.
    num_slots: rows of persistent state.
    max_steps: steps of one plan it can make of greedy decoding.
    phases: start-up phase -> seconds, for the start-up log line.
    description: facts about the chosen device, dtype and kernels, for the same line.
    """

    num_gpu_blocks: int
    num_cpu_blocks: int
    num_slots: int
    max_steps: int = 1
    phases: dict[str, float] = field(default_factory=dict)
    description: dict[str, str] = field(default_factory=dict)
