"""Speculative decoding: who proposes, how much, and when not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aserve.config.device import DeviceConfig
from aserve.config.model import ModelConfig, resolve_model_config, resolve_model_path
from aserve.config.parallel import ParallelConfig
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from aserve.args import EngineArgs

NGRAM = "[ngram]"


@dataclass(frozen=True)
class SpeculativeConfig:
    """``draft_model`` is None when n-grams of the prompt propose; the lookup sizes are then set."""

    num_speculative_tokens: int
    draft_model: ModelConfig | None
    disable_by_batch_size: int | None
    ngram_prompt_lookup_max: int | None
    ngram_prompt_lookup_min: int | None


def resolve_speculative_config(
    args: EngineArgs, model: ModelConfig, parallel: ParallelConfig, device: DeviceConfig
) -> SpeculativeConfig | None:
    """None unless a proposer is named."""
    if args.speculative_model is None:
        if args.num_speculative_tokens is not None:
            raise ConfigError("num_speculative_tokens needs speculative_model", param="speculative_model")
        return None
    tokens = args.num_speculative_tokens
    if tokens is None:
        raise ConfigError("speculative_model needs num_speculative_tokens", param="num_speculative_tokens")
    limit = args.speculative_disable_by_batch_size
    if limit is not None and limit < 2:
        raise ConfigError(
            f"speculative_disable_by_batch_size must be at least 2, got {limit}",
            param="speculative_disable_by_batch_size",
        )
    if args.enable_chunked_prefill:
        raise ConfigError(
            "speculative_model does not go with enable_chunked_prefill; choose one", param="speculative_model"
        )
    if not args.use_v2_block_manager:
        raise ConfigError("speculative_model needs use_v2_block_manager", param="use_v2_block_manager")
    if parallel.executor == "mp":
        raise ConfigError(
            "speculative_model does not go with distributed_executor_backend 'mp'",
            param="distributed_executor_backend",
        )
    draft, longest, shortest = None, None, None
    if args.speculative_model == NGRAM:
        longest, shortest = _resolve_ngram(args)
    else:
        draft = _resolve_draft(args.speculative_model, args, model, device)
    if tokens < 1:
        raise ConfigError(
            f"num_speculative_tokens must be at least 1, got {tokens}", param="num_speculative_tokens"
        )
    return SpeculativeConfig(tokens, draft, limit, longest, shortest)


def _resolve_ngram(args: EngineArgs) -> tuple[int, int]:
    longest = args.ngram_prompt_lookup_max
    if longest is None or longest < 1:
        raise ConfigError(
            f"speculative_model {NGRAM} needs ngram_prompt_lookup_max of at least 1, got {longest}",
            param="ngram_prompt_lookup_max",
        )
    shortest = 1 if args.ngram_prompt_lookup_min is None else args.ngram_prompt_lookup_min
    if not 1 <= shortest <= longest:
        raise ConfigError(
            f"ngram_prompt_lookup_min must be from 1 to ngram_prompt_lookup_max ({longest}), got {shortest}",
            param="ngram_prompt_lookup_min",
        )
    return longest, shortest


def _resolve_draft(name: str, args: EngineArgs, target: ModelConfig, device: DeviceConfig) -> ModelConfig:
    draft_args = dataclasses.replace(
        args,
        model=name,
        max_model_len=None,
        rope_scaling=None,
        quantization=None,
        dtype=target.dtype,
        revision=None,
        code_revision=None,
        served_model_name=None,
    )
    draft = resolve_model_config(draft_args, resolve_model_path(name), device)
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"speculative_model has {draft.vocab_size} tokens in its vocabulary and the model "
            f"{target.vocab_size}; they must be the same",
            param="speculative_model",
        )
    longest = min(draft.max_model_len, target.max_model_len)
    wanted = args.speculative_max_model_len
    if wanted is not None and not 1 <= wanted <= longest:
        raise ConfigError(
            f"speculative_max_model_len must be from 1 to {longest}, the shorter of the two "
            f"models, got {wanted}",
            param="speculative_max_model_len",
        )
    return dataclasses.replace(draft, max_model_len=wanted or longest)
