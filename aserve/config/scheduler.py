"""Limits and habits of the scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aserve.config.model import ModelConfig
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from aserve.args import EngineArgs

OVERLAPS = (0, 1)
PREEMPTION_MODES = ("recompute", "swap")

_CHUNKED_TOKENS = 512
_LEAST_DEFAULT_TOKENS = 2048


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step.

    max_num_batched_tokens: tokens. max_num_seqs: sequences, not requests. delay_factor: multiple of the
    last prompt's latency to wait before the next prompt. num_lookahead_slots: KV slots kept ahead of
    each sequence. overlap: steps launched before the previous one's results are read. preemption_mode:
    "recompute", "swap", or None to swap requests with several sequences alone. max_waiting_requests,
    max_waiting_tokens: length of the queue, None for any. num_scheduler_steps: most greedy decode steps done
    for one decision, None for what suits the device. max_decode_slowdown: how many times as long as its
    decodes a step with chunks of prompts may take, None for any.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    enable_chunked_prefill: bool
    delay_factor: float
    num_lookahead_slots: int
    overlap: int
    preemption_mode: str | None = None
    max_waiting_requests: int | None = None
    max_waiting_tokens: int | None = None
    num_scheduler_steps: int | None = None
    max_decode_slowdown: float | None = None


def resolve_scheduler_config(args: EngineArgs, model: ModelConfig) -> SchedulerConfig:
    if args.max_num_seqs < 1:
        raise ConfigError(f"max_num_seqs must be at least 1, got {args.max_num_seqs}", param="max_num_seqs")
    if args.num_lookahead_slots < 0:
        raise ConfigError(
            f"num_lookahead_slots must be 0 or more, got {args.num_lookahead_slots}",
            param="num_lookahead_slots",
        )
    if not 0 <= args.scheduler_delay_factor < math.inf:
        raise ConfigError(
            f"scheduler_delay_factor must be 0 or more, got {args.scheduler_delay_factor}",
            param="scheduler_delay_factor",
        )
    if args.preemption_mode not in (None, *PREEMPTION_MODES):
        raise ConfigError(
            f"preemption_mode must be one of {', '.join(PREEMPTION_MODES)}, got {args.preemption_mode!r}",
            param="preemption_mode",
        )
    if args.preemption_mode == "swap" and not args.swap_space:
        raise ConfigError("preemption_mode swap needs swap_space above 0", param="preemption_mode")
    for name in ("max_waiting_requests", "max_waiting_tokens", "num_scheduler_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}", param=name)
    slowdown = args.max_decode_slowdown
    if slowdown is not None and not 1 < slowdown < math.inf:
        raise ConfigError(f"max_decode_slowdown must be above 1, got {slowdown}", param="max_decode_slowdown")
    if args.overlap not in OVERLAPS:
        raise ConfigError(f"overlap must be 0 or 1, got {args.overlap}", param="overlap")
    return SchedulerConfig(
        max_num_batched_tokens=_resolve_token_budget(args, model.max_model_len),
        max_num_seqs=args.max_num_seqs,
        max_model_len=model.max_model_len,
        enable_chunked_prefill=chunks_prompts(args),
        delay_factor=args.scheduler_delay_factor,
        num_lookahead_slots=args.num_lookahead_slots,
        overlap=args.overlap,
        preemption_mode=args.preemption_mode,
        max_waiting_requests=args.max_waiting_requests,
        max_waiting_tokens=args.max_waiting_tokens,
        num_scheduler_steps=args.num_scheduler_steps,
        max_decode_slowdown=args.max_decode_slowdown,
    )


def chunks_prompts(args: EngineArgs) -> bool:
    """Whether prompts are computed in chunks; left open (None), they are."""
    if args.enable_chunked_prefill is None:
        return args.speculative_model is None
    return args.enable_chunked_prefill


def _resolve_token_budget(args: EngineArgs, max_model_len: int) -> int:
    tokens = args.max_num_batched_tokens
    if tokens is None:
        if chunks_prompts(args):
            tokens = max(_CHUNKED_TOKENS, args.max_num_seqs)
        else:
            tokens = max(max_model_len, _LEAST_DEFAULT_TOKENS, args.max_num_seqs)
    if tokens < max_model_len and not chunks_prompts(args):
        raise ConfigError(
            f"max_num_batched_tokens ({tokens}) is less than max_model_len ({max_model_len}), so a long "
            "prompt would never fit a step; raise it, lower max_model_len or set enable_chunked_prefill",
            param="max_num_batched_tokens",
        )
    if tokens < args.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({tokens}) is less than max_num_seqs "
            f"({args.max_num_seqs}); raise it or lower max_num_seqs",
            param="max_num_batched_tokens",
        )
    return tokens
