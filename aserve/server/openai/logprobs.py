"""Log-probabilities in the two shapes clients know.

Both show a log-probability below -9999 (a masked token's is minus infinity, which JSON lacks) as -9999.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aserve.messages.outputs import Logprob, TokenLogprobs

FLOOR = -9999.0


def text_of(token_id: int, entry: Logprob) -> str:
    """The token's text; a placeholder where the engine makes no text."""
    return entry.decoded_token if entry.decoded_token is not None else f"token_id:{token_id}"


class LegacyLogprobs:
    """The completions shape: four parallel lists. ``text_offset`` goes on from chunk to chunk."""

    def __init__(self) -> None:
        self._offset = 0

    def format(
        self, ids: Sequence[int], positions: Sequence[TokenLogprobs | None], first_text: str = ""
    ) -> dict[str, Any]:
        """``ids`` are the chosen tokens. A position is None where nothing predicts it: the prompt's
        first token, whose text is ``first_text``."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, position in zip(ids, positions, strict=True):
            if position is None:
                token, value, top = first_text, None, None
            else:
                chosen = position[token_id]
                token, value, top = text_of(token_id, chosen), max(chosen.logprob, FLOOR), _by_text(position)
            tokens.append(token)
            values.append(value)
            tops.append(top)
            offsets.append(self._offset)
            self._offset += len(token)
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


def _by_text(position: TokenLogprobs) -> dict[str, float]:
    found: dict[str, float] = {}
    for token_id, entry in position.items():
        text = text_of(token_id, entry)
        value = max(entry.logprob, FLOOR)
        # Different tokens can have one text. The likeliest keeps the place, so that a reader that
        # compares the chosen token with the maximum is not told that a loser won.
        found[text] = max(value, found.get(text, value))
    return found


def chat_logprobs(ids: Sequence[int], positions: Sequence[TokenLogprobs], top: int) -> dict[str, Any]:
    """The chat shape: one object per token with its ``top`` likeliest alternatives."""
    content = []
    for token_id, position in zip(ids, positions, strict=True):
        ranked = sorted(position.items(), key=lambda pair: -pair[1].logprob)[:top]
        entry = _chat_entry(token_id, position[token_id])
        entry["top_logprobs"] = [_chat_entry(other, logprob) for other, logprob in ranked]
        content.append(entry)
    return {"content": content}


def _chat_entry(token_id: int, entry: Logprob) -> dict[str, Any]:
    text = text_of(token_id, entry)
    return {
        "token": text,
        "logprob": max(entry.logprob, FLOOR),
        "bytes": list(text.encode("utf-8", "replace")),
    }
