"""What comes back to a caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from aserve.messages.inputs import LoRARequest

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_ABORT = "abort"


class Logprob(NamedTuple):
    """Log-probability of one token at one position.

    ``rank`` is 1-based in the whole vocabulary (1 + number of strictly likelier tokens).
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""One position: the chosen token first, then the top-k by rank."""


@dataclass
class RequestMetrics:
    """Wall-clock times (``time.time()`` seconds) of a request; None until known."""

    arrival_time: float
    last_token_time: float | None = None
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    time_in_queue: float | None = None
    finished_time: float | None = None


@dataclass
class CompletionOutput:
    """One generated sequence.

    With cumulative outputs ``text``, ``token_ids`` and ``logprobs`` hold everything generated so
    far; with delta outputs only what is new. ``index`` is the position among all ``best_of``
    sequences of the request.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: LoRARequest | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """State of one request after a step; a snapshot that never changes afterwards.

    num_cached_tokens: prompt tokens that the prefix cache had; None before the request has started.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    lora_request: LoRARequest | None = None
    num_cached_tokens: int | None = None


@dataclass
class EmbeddingOutput:
    """The vector of one prompt; its components are float32 values."""

    embedding: list[float]


@dataclass
class EmbeddingRequestOutput:
    """The only output of a request with PoolingParams."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int | None = None
