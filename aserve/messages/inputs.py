"""What a caller hands in besides sampling parameters."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any, TypedDict

from aserve.errors import InvalidRequestError


class TextPrompt(TypedDict):
    prompt: str


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


class ExplicitPrompt(TypedDict):
    prompt: str
    prompt_token_ids: list[int]


PromptInputs = str | TextPrompt | TokensPrompt | ExplicitPrompt


@dataclass(frozen=True, eq=False)
class LoRARequest:
    """Names an adapter. Two requests are equal when their integer ids are."""

    lora_name: str
    lora_int_id: int
    lora_local_path: str
    long_lora_max_len: int | None = None

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"lora_int_id must be at least 1, got {self.lora_int_id}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRARequest) and self.lora_int_id == other.lora_int_id

    def __hash__(self) -> int:
        return hash(self.lora_int_id)


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How a request is served, as opposed to what it generates.

    priority: requests with a lower one run first, those with equal ones by arrival; when the KV cache
        is full the highest gives way.
    timeout: seconds from its arrival after which the request is given up (RequestTimeoutError).
    cache_salt: computed prompts are shared only among requests with an equal salt.

    Raises InvalidRequestError (a ValueError) naming the field in ``param``.
    """

    priority: int = 0
    timeout: float | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        if type(self.priority) is not int or not -(1 << 31) <= self.priority < 1 << 31:
            raise InvalidRequestError("priority must be a 32-bit integer", param="priority")
        if self.timeout is not None and (
            isinstance(self.timeout, bool)
            or not isinstance(self.timeout, (int, float))
            or not 0 < self.timeout < math.inf
        ):
            raise InvalidRequestError("timeout must be seconds above 0", param="timeout")
        if self.cache_salt is not None and not (isinstance(self.cache_salt, str) and self.cache_salt):
            raise InvalidRequestError("cache_salt must be a non-empty string", param="cache_salt")


@dataclass
class MultiModalData:
    """Data of another modality that belongs to a prompt."""

    class Type(enum.Enum):
        IMAGE = enum.auto()

    type: Type
    data: Any


@dataclass
class PoolingParams:
    """How a prompt becomes one vector: the final hidden state of its last token.

    additional_data: the caller's own; not looked at.
    dimensions: keep the first this many components; None keeps all.
    normalize: scale what is kept to length 1.

    Raises InvalidRequestError (a ValueError) naming the field in ``param``.
    """

    additional_data: Any = None
    dimensions: int | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.dimensions is not None and (type(self.dimensions) is not int or self.dimensions < 1):
            raise InvalidRequestError("dimensions must be an integer from 1", param="dimensions")
        if not isinstance(self.normalize, bool):
            raise InvalidRequestError("normalize must be true or false", param="normalize")

    def clone(self) -> PoolingParams:
        return PoolingParams(self.additional_data, self.dimensions, self.normalize)


class UsageContext(enum.StrEnum):
    """Which entry point built the engine. Logged at start; nothing is ever sent anywhere."""

    UNKNOWN_CONTEXT = "UNKNOWN_CONTEXT"
    LLM_CLASS = "LLM_CLASS"
    API_SERVER = "API_SERVER"
    OPENAI_API_SERVER = "OPENAI_API_SERVER"
    OPENAI_BATCH_RUNNER = "OPENAI_BATCH_RUNNER"
    ENGINE_CONTEXT = "ENGINE_CONTEXT"


class OutputKind(enum.Enum):
    """How much of a request's output each RequestOutput carries."""

    CUMULATIVE = enum.auto()
    """Everything generated so far (what ``AsyncLLMEngine.generate`` yields)."""
    DELTA = enum.auto()
    """Only what is new since the last one taken (what the HTTP server streams)."""
    FINAL_ONLY = enum.auto()
    """One output, when the request has ended (what ``LLM.generate`` waits for)."""
