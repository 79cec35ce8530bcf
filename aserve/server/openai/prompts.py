"""From what a client sends as prompt to token ids that fit the model."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from aserve.errors import InvalidRequestError
from aserve.server.openai.protocol import MAX_PROMPTS, check_token_ids

if TYPE_CHECKING:
    from aserve.engine.async_engine import AsyncLLMEngine

TokenIds: TypeAlias = "list[int] | array[int]"
"""Ids as they came: those of a large body are packed."""


@dataclass
class Prompt:
    """One prompt, tokenised. ``text`` is None for a prompt sent as ids whose text nobody needs."""

    text: str | None
    ids: list[int]

    def inputs(self) -> Any:
        """The form the engine takes."""
        if self.text is None:
            return {"prompt_token_ids": self.ids}
        return {"prompt": self.text, "prompt_token_ids": self.ids}


def split(prompt: Any, param: str = "prompt") -> list[str] | list[TokenIds]:
    """One entry per prompt, from any of the four forms: text, texts, ids, lists of ids.

    Raises InvalidRequestError for anything else and for empty prompts.
    """
    if isinstance(prompt, (str, array)):
        prompt = [prompt]
    if not isinstance(prompt, list):
        raise InvalidRequestError(
            f"{param} must be a string, a list of strings, a list of token ids or a list of such lists",
            param=param,
        )
    if prompt and _all_ints(prompt):
        prompt = [prompt]
    if not prompt or not all(prompt):
        raise InvalidRequestError(f"{param} must not be empty", param=param)
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequestError(f"{param} may hold at most {MAX_PROMPTS} prompts", param=param)
    texts: list[str] = [item for item in prompt if isinstance(item, str)]
    if len(texts) == len(prompt):
        return texts
    ids: list[TokenIds] = [
        item for item in prompt if isinstance(item, array) or (isinstance(item, list) and _all_ints(item))
    ]
    if len(ids) == len(prompt):
        return ids
    raise InvalidRequestError(
        f"{param} must hold strings, token ids or lists of token ids, all of one kind", param=param
    )


def _all_ints(items: list[Any]) -> bool:
    return set(map(type, items)) <= {int}  # exactly int: True is no token id


async def tokenise(
    engine: AsyncLLMEngine,
    item: str | TokenIds,
    *,
    add_special_tokens: bool,
    truncate: int | None,
    want_text: bool,
    param: str = "prompt",
) -> Prompt:
    """Token ids of one prompt, cut to its last ``truncate`` tokens."""
    if isinstance(item, str):
        ids = await engine.encode_prompt(item, add_special_tokens)
        text: str | None = item
    else:
        ids, text = _unpacked(engine, item, truncate, param), None
    if truncate is not None and len(ids) > truncate:
        ids, text = ids[-truncate:], None
    if not ids:
        raise InvalidRequestError(f"{param} holds no tokens", param=param)
    if not isinstance(item, str):
        check_token_ids(ids, engine.model_config.vocab_size, param)
    if text is None and want_text:
        text = (await tokenizer_of(engine)).decode(ids)
    return Prompt(text, ids)


def _unpacked(engine: AsyncLLMEngine, ids: TokenIds, truncate: int | None, param: str) -> list[int]:
    if isinstance(ids, list):
        return ids
    if truncate is not None:
        ids = ids[-truncate:]
    longest = engine.model_config.max_model_len
    if len(ids) > longest:
        raise InvalidRequestError(
            f"the model's context holds {longest} tokens and {param} has {len(ids)}", param=param
        )
    return ids.tolist()


_CHARS_IN_A_ROW = 16_000


async def tokenise_all(
    engine: AsyncLLMEngine, items: list[str] | list[TokenIds], **options: Any
) -> list[Prompt]:
    """:func:`tokenise` for every prompt of a call, with pauses: thousands of short texts take seconds."""
    found = []
    since = 0
    for item in items:
        found.append(await tokenise(engine, item, **options))
        since += len(item)
        if since > _CHARS_IN_A_ROW:
            since = 0
            await asyncio.sleep(0)
    return found


async def tokenizer_of(engine: AsyncLLMEngine) -> Any:
    """The engine's tokenizer; InvalidRequestError if it runs without one."""
    tokenizer = await engine.get_tokenizer()
    if tokenizer is None:
        raise InvalidRequestError(
            "this server has no tokenizer (skip_tokenizer_init): send token ids", param="prompt"
        )
    return tokenizer


def output_budget(prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> int:
    """Tokens the output may have; raises InvalidRequestError if prompt and output cannot fit."""
    if max_tokens is None:
        if prompt_tokens >= max_model_len:
            raise InvalidRequestError(
                f"the model's context holds {max_model_len} tokens and the prompt alone has {prompt_tokens}",
                param="messages",
            )
        return max_model_len - prompt_tokens
    if max_tokens < 0:
        raise InvalidRequestError("max_tokens must be at least 0", param="max_tokens")
    if prompt_tokens + max_tokens > max_model_len:
        raise InvalidRequestError(
            f"the model's context holds {max_model_len} tokens but {prompt_tokens + max_tokens} were asked "
            f"for: {prompt_tokens} in the prompt and {max_tokens} for the output",
            param="max_tokens",
        )
    return max_tokens


def check_logprobs(count: int | None, max_logprobs: int, param: str) -> None:
    """Raises InvalidRequestError if more alternatives are asked for than the engine gives."""
    if count is not None and count > max_logprobs:
        raise InvalidRequestError(
            f"{param} must be at most {max_logprobs} (max_logprobs), got {count}", param=param
        )
