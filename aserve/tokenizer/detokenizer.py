"""Text of a growing sequence of tokens."""

from __future__ import annotations

import codecs
import json
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
    table: ByteTable | PieceTable | None


class ByteTable(dict[int, "str | bytes"]):
    """What each token adds to a text, for tokenizers whose tokens are bytes (GPT-2's byte-level BPE).

    A string where the bytes are whole characters, else the bytes. Tokens are written in characters that
    stand for one byte each (``bytes_to_unicode`` of GPT-2's encoder); one that is not so written, such
    as an added token, stands for itself.
    """

    def __init__(self, backend: Any) -> None:
        self._token = backend.id_to_token

    def __missing__(self, token_id: int) -> str | bytes:
        token: str = self._token(token_id) or ""  # an id that the vocabulary leaves out
        try:
            data = bytes(_BYTE_OF[char] for char in token)
        except KeyError:
            data = token.encode()
        piece: str | bytes
        try:
            piece = data.decode()
        except UnicodeDecodeError:
            piece = data
        self[token_id] = piece
        return piece


class PieceTable(dict[int, "str | None"]):
    """What each token adds to a text, for SentencePiece's tokens with bytes for unknown characters.

    None for those that have to be looked at with their neighbours: bytes, and nothing.

    strips: whether a space at the start of a text is dropped.
    """

    def __init__(self, backend: Any, strips: bool) -> None:
        self._token = backend.id_to_token
        self.strips = strips

    def __missing__(self, token_id: int) -> str | None:
        token: str = self._token(token_id) or ""
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        piece = None if not token or is_byte or _REPLACEMENT in token else token.replace("\u2581", " ")
        self[token_id] = piece
        return piece


def _bytes_to_unicode() -> dict[str, int]:
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    found = {chr(byte): byte for byte in shown}
    found.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return found


_BYTE_OF = _bytes_to_unicode()
_UTF8 = codecs.getincrementaldecoder("utf-8")

_known_tokenizers: weakref.WeakKeyDictionary[Any, _Facts] = weakref.WeakKeyDictionary()


class Detokenizer:
    """Decodes one sequence incrementally; the pieces together are the decoding of the whole.

    With a tokenizer whose decoder is a known one, a token's text is looked up. With any other, and where
    the neighbours matter, each token is decoded together with the few before it, and what those alone
    decode to is cut off: a tokenizer may write a token differently at the start of a text. A piece that
    ends in an incomplete character is withheld until the character is complete. The one difference to
    decoding the whole is with tokenizers that spell characters in byte tokens and give up on a whole run
    of those for one bad byte: characters of the run that were complete before stay.

    prompt_token_ids: only the last few are looked at. Ids outside the vocabulary decode to nothing.
    spaces_between_special_tokens acts only with slow tokenizers that have added tokens.
    """

    __slots__ = (
        "_begun",
        "_decode",
        "_ids",
        "_partial",
        "_prefix",
        "_read",
        "_silent",
        "_size",
        "_table",
        "_utf8",
    )

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
        self._table = facts.table
        self._utf8 = _UTF8("replace") if isinstance(facts.table, ByteTable) else None
        self._partial = False
        self._begun = isinstance(facts.table, PieceTable) and not facts.table.strips
        # Bytes need no context: a character that the prompt left incomplete is no part of the output.
        self._ids = [] if self._utf8 is not None else self._context(prompt_token_ids)
        self._prefix = 0
        self._read = len(self._ids)

    def append(self, token_ids: list[int]) -> list[str]:
        """One piece of text per token, possibly empty."""
        return [self.push(token_id) for token_id in token_ids]

    def push(self, token_id: int) -> str:
        """The piece of text that one token adds, possibly empty."""
        # Tokens without text are left out rather than decoded: many of them (an end-of-sequence token
        # that is ignored) must neither be decoded again and again nor push the context out.
        if token_id >= self._size or token_id in self._silent:
            return ""
        table = self._table
        if table is None:
            return self._append(token_id)
        piece = table[token_id]
        utf8 = self._utf8
        if utf8 is not None and piece is not None:
            if isinstance(piece, str):
                if not self._partial:
                    return piece
                piece = piece.encode()
            text = utf8.decode(piece)
            self._partial = utf8.getstate()[0] != b""
            return text
        if isinstance(piece, str) and self._begun and self._read == len(self._ids):
            self._ids.append(token_id)
            self._handed_out()
            return piece
        text = self._append(token_id)
        # From here on the text before is not empty, so nothing is at the start of a text any more.
        self._begun = self._begun or text != ""
        return text

    def flush(self) -> str:
        """What is still withheld, at the end of the sequence."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", True)
        known = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def fork(self) -> Detokenizer:
        copy = object.__new__(Detokenizer)
        copy._decode, copy._size, copy._silent = self._decode, self._size, self._silent
        copy._ids, copy._prefix, copy._read = list(self._ids), self._prefix, self._read
        copy._table, copy._partial, copy._begun = self._table, self._partial, self._begun
        copy._utf8 = None
        if self._utf8 is not None:
            copy._utf8 = _UTF8("replace")
            copy._utf8.setstate(self._utf8.getstate())
        return copy

    def _append(self, token_id: int) -> str:
        self._ids.append(token_id)
        known = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        unfinished = text.endswith(_REPLACEMENT) or len(text) <= len(known)
        if unfinished and len(self._ids) - self._read < _LONGEST_WAIT:
            return ""
        self._handed_out()
        return text[len(known) :]

    def _handed_out(self) -> None:
        self._prefix, self._read = self._read, len(self._ids)
        if self._prefix > 64:  # so that memory and slicing do not grow
            del self._ids[: self._prefix]
            self._read -= self._prefix
            self._prefix = 0

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
        table = _table(tokenizer.backend_tokenizer) if tokenizer.is_fast else None
        facts = _Facts(len(tokenizer), frozenset(special), frozenset(added), table)
        _known_tokenizers[tokenizer] = facts
    return facts


def _table(backend: Any) -> ByteTable | PieceTable | None:
    """A table for the two decoders whose rules are known here; None for others."""
    if backend.decoder is None:
        return None
    rules = json.loads(backend.decoder.__getstate__())
    steps = rules["decoders"] if rules["type"] == "Sequence" else [rules]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return ByteTable(backend)
    sentencepiece = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if steps[:3] != sentencepiece:
        return None
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if steps[3:] not in ([], [strip]):
        return None
    return PieceTable(backend, strips=steps[3:] == [strip])


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
