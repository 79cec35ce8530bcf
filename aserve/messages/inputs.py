"""What a caller hands in besides sampling parameters."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, TypedDict


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


@dataclass
class MultiModalData:
    """Data of another modality that belongs to a prompt."""

    class Type(enum.Enum):
        IMAGE = enum.auto()

    type: Type
    data: Any


@dataclass
class PoolingParams:
    """Parameters of an embedding request."""

    additional_data: Any = None

    def clone(self) -> PoolingParams:
        return PoolingParams(additional_data=self.additional_data)


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
