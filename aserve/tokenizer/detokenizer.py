"""Text of a growing sequence of tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_CONTEXT = 7
"""Prompt tokens decoded along with the first output tokens, so that spacing rules see them."""

_LONGEST_WAIT = 256
"""Tokens after which undecodable bytes are handed out as they are; a character has at most four."""

_REPLACEMENT = "\ufffd"

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is asked of a tokenizer once, because it takes milliseconds for a large vocabulary."""

    size: int
    special: frozenset[int]
    added: frozenset[int]


_known_tokenizers: weakref.WeakKeyDictionary[Any, _Facts] = weakref.WeakKeyDictionary()


class Detokenizer:
    """Decodes one sequence incrementally; the pieces together are the decoding of the whole.

    Each token is decoded together with the few before it, and what those alone decode to is cut off: a
    tokenizer may write a token differently at the start of a text. A piece that ends in an incomplete
    character is withheld until the character is complete. The one difference to decoding the whole is
    with tokenizers that spell characters in byte tokens and give up on a whole run of those for one bad
    byte: characters of the run that were complete before stay.

    prompt_token_ids: only the last few are looked at. Ids outside the vocabulary decode to nothing.
    spaces_between_special_tokens acts only with slow tokenizers that have added tokens.
    """

    __slots__ = ("_decode", "_ids", "_prefix", "_read", "_silent", "_size")

    def __init__(
        self,
        tokenizer: Any,
        prompt_token_ids: list[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        facts = _facts(tokenizer)
        self._size = facts.size
        self._silent = facts.special if skip_special_tokens else frozenset()
        self._decode = (
            _fast_decoder(tokenizer)
            if tokenizer.is_fast
            else _slow_decoder(tokenizer, facts.added, " " if spaces_between_special_tokens else "")
        )
        self._ids = self._context(prompt_token_ids)
        self._prefix = 0
        self._read = len(self._ids)

    def append(self, token_ids: list[int]) -> list[str]:
        """One piece of text per token, possibly empty."""
        return [self._append(token_id) for token_id in token_ids]

    def flush(self) -> str:
        """What is still withheld, at the end of the sequence."""
        known = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def fork(self) -> Detokenizer:
        copy = object.__new__(Detokenizer)
        copy._decode, copy._size, copy._silent = self._decode, self._size, self._silent
        copy._ids, copy._prefix, copy._read = list(self._ids), self._prefix, self._read
        return copy

    def _append(self, token_id: int) -> str:
        # Tokens without text are left out rather than decoded: many of them (an end-of-sequence token
        # that is ignored) must neither be decoded again and again nor push the context out.
        if token_id >= self._size or token_id in self._silent:
            return ""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        unfinished = text.endswith(_REPLACEMENT) or len(text) <= len(known)
        if unfinished and len(self._ids) - self._read < _LONGEST_WAIT:
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        if self._prefix > 64:  # so that memory and slicing do not grow
            del self._ids[: self._prefix]
            self._read -= self._prefix
            self._prefix = 0
        return text[len(known) :]

    def _context(self, prompt_token_ids: list[int]) -> list[int]:
        """The last visible tokens of the prompt, cut so that no character in them is incomplete.

        Bytes of a character cut in two would spoil, or swallow, the first bytes of the output.
        """
        last = prompt_token_ids[-_CONTEXT:]
        context = [token for token in last if token < self._size and token not in self._silent]
        while context and _REPLACEMENT in self._decode(context):
            del context[0]
        return context


def _facts(tokenizer: Any) -> _Facts:
    facts = _known_tokenizers.get(tokenizer)
    if facts is None:
        added = tokenizer.added_tokens_decoder
        if tokenizer.is_fast:
            special = {token_id for token_id, token in added.items() if token.special}
        else:
            special = set(tokenizer.all_special_ids)
        facts = _Facts(len(tokenizer), frozenset(special), frozenset(added))
        _known_tokenizers[tokenizer] = facts
    return facts


def _fast_decoder(tokenizer: Any) -> Decode:
    backend = tokenizer.backend_tokenizer

    def decode(ids: list[int]) -> str:
        text: str = backend.decode(ids, skip_special_tokens=False)
        return text

    return decode


def _slow_decoder(tokenizer: Any, added: frozenset[int], space: str) -> Decode:
    """Added tokens stand for themselves, with ``space`` between them and the text around them.

    ``tokenizer.decode`` used to do that; from transformers 5 on it joins everything alike.
    """

    def decode(ids: list[int]) -> str:
        parts: list[str] = []
        run: list[Any] = []
        for token_id, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
            if token_id not in added:
                if token is not None:  # an id that the vocabulary leaves out
                    run.append(token)
                continue
            if run:
                parts.append(tokenizer.convert_tokens_to_string(run))
                run = []
            parts.append(token)
        if run:
            parts.append(tokenizer.convert_tokens_to_string(run))
        return space.join(parts)

    return decode
