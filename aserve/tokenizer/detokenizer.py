"""Text of a growing sequence of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_CONTEXT = 7
"""Prompt tokens decoded along with the first output tokens, so that spacing rules see them."""

_LONGEST_WAIT = 256
"""Tokens after which undecodable bytes are handed out as they are; a character has at most four."""

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes one sequence incrementally; the pieces together are the decoding of the whole.

    Each token is decoded together with the few before it, and what those alone decode to is cut off: a
    tokenizer may write a token differently at the start of a text. A piece that ends in an incomplete
    character is withheld until the character is complete.

    prompt_token_ids: only the last few are looked at. Ids outside the vocabulary decode to nothing.
    spaces_between_special_tokens acts only with slow tokenizers that have added tokens.
    """

    __slots__ = ("_decode", "_ids", "_prefix", "_read", "_size")

    def __init__(
        self,
        tokenizer: Any,
        prompt_token_ids: list[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._size = len(tokenizer)
        self._decode = _decoder(tokenizer, skip_special_tokens, spaces_between_special_tokens)
        self._ids = [token for token in prompt_token_ids[-_CONTEXT:] if token < self._size]
        self._prefix = 0
        self._read = len(self._ids)

    def append(self, token_ids: list[int]) -> list[str]:
        """One piece of text per token, possibly empty."""
        return [self._append(token_id) for token_id in token_ids]

    def _append(self, token_id: int) -> str:
        if token_id >= self._size:
            return ""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        if len(text) <= len(known):
            # Nothing visible yet (a skipped special token), or a character still in the making.
            self._trim()
            return ""
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._read < _LONGEST_WAIT:
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        self._trim()
        return text[len(known) :]

    def flush(self) -> str:
        """What is still withheld, at the end of the sequence."""
        known = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def fork(self) -> Detokenizer:
        copy = object.__new__(Detokenizer)
        copy._decode, copy._size = self._decode, self._size
        copy._ids, copy._prefix, copy._read = list(self._ids), self._prefix, self._read
        return copy

    def _trim(self) -> None:
        """Forgets ids that are not decoded again, so that memory and slicing do not grow."""
        if self._prefix > 64:
            del self._ids[: self._prefix]
            self._read -= self._prefix
            self._prefix = 0


def _decoder(tokenizer: Any, skip: bool, spaces: bool) -> Callable[[list[int]], str]:
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        return lambda ids: backend.decode(ids, skip_special_tokens=skip)
    options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
    if tokenizer.get_added_vocab():
        options["spaces_between_special_tokens"] = spaces
    return lambda ids: tokenizer.decode(ids, **options)
