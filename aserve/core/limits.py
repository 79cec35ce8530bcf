"""What a scheduler may use and how it decides."""

from __future__ import annotations

from dataclasses import dataclass

RECOMPUTE, SWAP = "recompute", "swap"


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """
    max_num_batched_tokens: tokens of one step.
    max_num_seqs: sequences running at once; also the number of worker slots.
    chunked_prefill: mix chunks of prompts with decodes instead of running whole prompts first.
    delay_factor: with something running, the next waiting prompt waits this many times the duration of
        the last prompt step.
    prefix_caching: find full blocks by their tokens.
    window: tokens that every layer sees, if all have the same sliding window.
    num_swap_blocks: blocks of host memory for preempted requests.
    preemption_mode: "recompute" or "swap"; None swaps requests with several sequences alone.
    num_lookahead_slots: slots reserved behind the next token of every sequence that draws one.
    max_waiting_requests, max_waiting_tokens: length of the queue, in requests and in prompt tokens.
    """

    num_blocks: int
    block_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    chunked_prefill: bool = False
    delay_factor: float = 0.0
    prefix_caching: bool = False
    window: int | None = None
    num_swap_blocks: int = 0
    preemption_mode: str | None = None
    num_lookahead_slots: int = 0
    max_waiting_requests: int | None = None
    max_waiting_tokens: int | None = None
