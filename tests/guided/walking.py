"""Outputs drawn at random from what a grammar allows: nothing but the grammar steers them."""

from __future__ import annotations

import numpy as np

from aserve.guided.base import Grammar, Matcher, Vocabulary


def allowed(matcher: Matcher, vocabulary: Vocabulary) -> tuple[np.ndarray, bool]:
    """Tokens that may come next, and whether the output may end."""
    words = np.full(-(-len(vocabulary.tokens) // 32), 0xFFFFFFFF, dtype=np.uint32)
    may_end = matcher.fill(words)
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")), may_end


def draw(
    grammar: Grammar, vocabulary: Vocabulary, rng: np.random.Generator, most: int = 300
) -> tuple[list[int], bool]:
    """Token ids, and whether the output came to its end within ``most`` tokens.

    Every other token is the shortest of those allowed that closes something, so that most outputs end.
    """
    matcher, ids = grammar.matcher(), []
    closing = {index for index, token in enumerate(vocabulary.tokens) if token in (b'"', b"}", b"]", b",")}
    for _ in range(most):
        tokens, may_end = allowed(matcher, vocabulary)
        if may_end and (not len(tokens) or rng.random() < 0.5):
            return ids, True
        assert len(tokens), "nothing is allowed, not even the end"
        assert vocabulary.eos_token_id not in tokens
        ends = [int(each) for each in tokens if int(each) in closing] if rng.random() < 0.5 else []
        ids.append(int(rng.choice(ends or tokens)))
        matcher.advance(ids[-1])
    return ids, False


def spell(ids: list[int], vocabulary: Vocabulary) -> str:
    return b"".join(vocabulary.tokens[each] for each in ids).decode()
