"""From what callers pass to what the scheduler queues."""

from __future__ import annotations

import random
import string
import threading
from typing import Any

from aserve.config.engine import EngineConfig
from aserve.core.sequence import SequenceGroup
from aserve.errors import InvalidRequestError
from aserve.guided.base import Grammar
from aserve.guided.compiler import GrammarCompiler
from aserve.guided.vocabulary import read_vocabulary
from aserve.messages.inputs import (
    LoRARequest,
    MultiModalData,
    PoolingParams,
    PromptInputs,
    RequestOptions,
)
from aserve.messages.params import SamplingParams
from aserve.tokenizer.quick import quick_encoder

_MASK64 = (1 << 64) - 1

_USUAL_PIECE = 16
"""Characters of text per token of the context that no text is questioned about."""

_LONG_TEXT = 4096
"""Characters from which others are let run while a text is tokenised."""

_POOLED = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
"""Stands in for the sampling parameters of a request that is not sampled."""


_LETTERS = string.ascii_letters.encode()


def _count_letters(text: str) -> int:
    """Letters of ASCII in a text."""
    data = text.encode(errors="replace")
    return len(data) - len(data.translate(None, _LETTERS))


class InputProcessor:
    """Validates and tokenises requests. Everything it refuses, it refuses with InvalidRequestError."""

    def __init__(self, config: EngineConfig, tokenizer: Any | None, generation_eos: set[int]) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id: int | None = None if tokenizer is None else tokenizer.eos_token_id
        self._config = config
        self._extra_stop_ids = generation_eos - {self.eos_token_id}
        self._rng = random.Random(config.model.seed)
        self._lock = threading.Lock()
        self._longest_piece: int | None = None
        self._most_letters = 0
        self._fast = tokenizer is not None and tokenizer.is_fast
        fast = tokenizer if self._fast else None
        self._quick = None if fast is None else quick_encoder(fast.backend_tokenizer)
        # Not a bound method: the compiler's thread must not keep the engine alive.
        vocab_size = config.model.vocab_size
        self.guides = GrammarCompiler(config.decoding, lambda: read_vocabulary(tokenizer, vocab_size))

    # ---------------------------------------------------------------- prompts

    def split(
        self, inputs: PromptInputs | None, prompt_token_ids: list[int] | None = None
    ) -> tuple[str | None, list[int] | None]:
        """Text and token ids of a prompt in any of its forms; at least one is not None."""
        text: Any = inputs
        ids: Any = prompt_token_ids
        if isinstance(inputs, dict):
            text = inputs.get("prompt")
            ids = inputs.get("prompt_token_ids") if ids is None else ids
        if text is not None and not isinstance(text, str):
            raise InvalidRequestError(f"prompt must be a string, got {type(text).__name__}", param="prompt")
        if text is None and ids is None:
            raise InvalidRequestError("either prompt or prompt_token_ids is required", param="prompt")
        if text is not None and ids is None and self.tokenizer is None:
            raise InvalidRequestError(
                "prompt cannot be tokenised because skip_tokenizer_init is set; pass prompt_token_ids",
                param="prompt",
            )
        return text, ids

    def is_doubtful(self, text: str) -> bool:
        """Whether a text is so long that ``check_fits`` has to look at it."""
        return len(text) > _USUAL_PIECE * self._config.model.max_model_len

    @property
    def longest_text(self) -> int | None:
        """Characters that the context's tokens can hold; None until ``check_fits`` has read the vocabulary,
        and where a prompt may be more than its text."""
        if self._longest_piece is None or self._config.vision_language is not None:
            return None
        return self._config.model.max_model_len * self._longest_piece

    def check_fits(self, text: str) -> None:
        """Raises InvalidRequestError for a text of more characters than the context's tokens can hold.

        May be called from any thread; the first call reads the vocabulary.
        """
        if self.tokenizer is None:
            return
        if self._longest_piece is None:
            # Special tokens included. A vocabulary of bytes has at least as many symbols as characters.
            vocabulary = self.tokenizer.get_vocab()
            self._most_letters = max(_USUAL_PIECE, *map(_count_letters, vocabulary))
            self._longest_piece = max(_USUAL_PIECE, *map(len, vocabulary))
        longest = self._config.model.max_model_len
        # The longest tokens are runs of one sign; of letters most texts need many more.
        if len(text) > longest * self._longest_piece or _count_letters(text) > longest * self._most_letters:
            raise InvalidRequestError(
                f"the model's context holds {longest} tokens; a text of {len(text)} characters cannot fit it",
                param="prompt",
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. May be called from any thread."""
        if self.tokenizer is None:
            raise InvalidRequestError("there is no tokenizer: skip_tokenizer_init is set", param="prompt")
        if self._fast:
            # The wrapper resets truncation and padding on every call, which is not thread-safe; the
            # tokenizer beneath it only reads.
            if self._quick is not None:
                ids = self._quick.encode(text, add_special_tokens)
                if ids is not None:
                    return ids
            backend = self.tokenizer.backend_tokenizer
            if len(text) > _LONG_TEXT:
                # encode() would hold the GIL to its end: a hundred milliseconds for a long prompt.
                (found,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                return list(found.ids)
            return list(backend.encode(text, add_special_tokens=add_special_tokens).ids)
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    # ---------------------------------------------------------------- requests

    def check_params(self, params: object) -> SamplingParams | PoolingParams:
        """Refuses what this engine cannot honour, before any work is done on the prompt."""
        if isinstance(params, PoolingParams):
            size = self._config.model.output_size
            if params.dimensions is not None and params.dimensions > size:
                raise InvalidRequestError(
                    f"dimensions must be at most {size}, the width of this model", param="dimensions"
                )
            return params
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(
                f"params must be SamplingParams or PoolingParams, got {type(params).__name__}", param="params"
            )
        if params.guided is not None:
            self.guides.check(params.guided)
        width = params.best_of or params.n
        max_num_seqs = self._config.scheduler.max_num_seqs
        if width > max_num_seqs:
            raise InvalidRequestError(
                f"best_of={width} exceeds max_num_seqs={max_num_seqs} of this engine", param="best_of"
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > self._config.model.max_logprobs:
                raise InvalidRequestError(
                    f"{name}={value} exceeds max_logprobs={self._config.model.max_logprobs} of this engine",
                    param=name,
                )
        vocab_size = self._config.model.vocab_size
        for token in params.logit_bias or ():
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(
                    f"logit_bias names token {token}; the vocabulary has {vocab_size}", param="logit_bias"
                )
        if params.stop and (self.tokenizer is None or not params.detokenize):
            raise InvalidRequestError("stop strings need detokenisation, which is off", param="stop")
        return params

    def make_group(
        self,
        request_id: str,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams | PoolingParams,
        arrival_time: float,
        lora_request: LoRARequest | None = None,
        multi_modal_data: MultiModalData | None = None,
        options: RequestOptions | None = None,
        grammar: Grammar | None = None,
    ) -> SequenceGroup:
        """A request ready to be queued; ``params`` has passed ``check_params`` and is not modified.

        grammar: ``params.guided`` compiled.
        """
        if lora_request is not None:
            raise InvalidRequestError(
                f"LoRA is not enabled, so adapter {lora_request.lora_name!r} cannot be used",
                param="lora_request",
            )
        if multi_modal_data is not None:
            raise InvalidRequestError("this model takes text only", param="multi_modal_data")
        if not token_ids:
            raise InvalidRequestError("the prompt is empty", param="prompt")
        vocab_size = self._config.model.vocab_size
        # Bounds first: a full scan with messages is needed only for a prompt that fails them.
        if set(map(type, token_ids)) != {int} or not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            raise InvalidRequestError(
                f"token ids must be integers from 0 to {vocab_size - 1}", param="prompt_token_ids"
            )
        pooling = None
        if isinstance(params, PoolingParams):
            longest = self._config.model.max_model_len
            if len(token_ids) > longest:
                raise InvalidRequestError(
                    f"the model's context holds {longest} tokens and the prompt has {len(token_ids)}",
                    param="prompt",
                )
            pooling, params = params.clone(), _POOLED
        params = params.clone()
        if not params.ignore_eos and self._extra_stop_ids:
            params.stop_token_ids = sorted({*(params.stop_token_ids or ()), *self._extra_stop_ids})
        if params.seed is None:
            rng_base = self._rng.getrandbits(64)
        else:
            rng_base = params.seed & _MASK64
        options = options or RequestOptions()
        return SequenceGroup(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=list(token_ids),
            params=params,
            arrival_time=arrival_time,
            max_model_len=self._config.model.max_model_len,
            rng_base=rng_base,
            eos_token_id=self.eos_token_id,
            lora_request=lora_request,
            priority=options.priority,
            deadline=None if options.timeout is None else arrival_time + options.timeout,
            cache_salt=options.cache_salt,
            pooling=pooling,
            grammar=grammar,
        )
