"""The bytes that a tokenizer's tokens stand for."""

from __future__ import annotations

import json
import re
from typing import Any

from aserve.errors import InvalidRequestError
from aserve.guided.base import Vocabulary

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


def read_vocabulary(tokenizer: Any, vocab_size: int) -> Vocabulary:
    """Tokens of a transformers tokenizer for a model with ``vocab_size`` logits.

    Raises InvalidRequestError for a tokenizer that guided decoding cannot work with.
    """
    if tokenizer is None:
        raise InvalidRequestError("guided decoding needs a tokenizer: skip_tokenizer_init is set")
    eos = tokenizer.eos_token_id
    if eos is None or not 0 <= eos < vocab_size:
        raise InvalidRequestError("guided decoding needs an end-of-sequence token, and this model has none")
    special = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {index for index, token in added.items() if getattr(token, "special", False)}
    literal = {index for index in added if index not in special}
    decoders = _decoders(tokenizer)
    tokens = [b""] * vocab_size
    for piece, index in tokenizer.get_vocab().items():
        if index >= vocab_size or index in special:
            continue
        if index in literal:
            tokens[index] = piece.encode()
        elif "ByteLevel" in decoders:
            tokens[index] = _from_byte_level(piece)
        elif "ByteFallback" in decoders or "Replace" in decoders or "Metaspace" in decoders:
            byte = _BYTE_TOKEN.match(piece) if "ByteFallback" in decoders else None
            tokens[index] = bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
        else:
            tokens[index] = _by_decoding(tokenizer, index)
    return Vocabulary(tokens, eos)


def _decoders(tokenizer: Any) -> set[str]:
    """Kinds of decoder that a fast tokenizer chains; empty for a slow one."""
    if not getattr(tokenizer, "is_fast", False):
        return set()
    parts = tokenizer.backend_tokenizer.decoder
    # The decoder's JSON alone: that of the whole tokenizer takes a quarter of a second.
    decoder = {} if parts is None else json.loads(parts.__getstate__())
    return {each.get("type", "") for each in (decoder, *decoder.get("decoders", ()))}


def _byte_table() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE (GPT-2): bytes that print stand for themselves, the
    others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = str.maketrans({stand_in: chr(byte) for stand_in, byte in _byte_table().items()})


def _from_byte_level(piece: str) -> bytes:
    try:
        return piece.translate(_BYTES).encode("latin-1")
    except UnicodeEncodeError:  # a character that stands for no byte
        return b""


def _by_decoding(tokenizer: Any, index: int) -> bytes:
    """For a slow tokenizer: what the token adds to a text; b"" for a piece of a character."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before, text = tokenizer.decode(anchor), tokenizer.decode([*anchor, index])
    if not text.startswith(before) or "\ufffd" in text:
        return b""
    return bytes(text[len(before) :].encode())
