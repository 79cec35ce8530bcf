"""The backend ``outlines``: an index of the whole vocabulary for every state of an expression."""

from __future__ import annotations

from typing import Any

import numpy as np

from aserve.guided.base import Backend, Grammar, GrammarError, GuideSpec, Matcher, Vocabulary
from aserve.guided.expression import expression_of
from aserve.guided.llguidance import LLGuidanceBackend

MAX_INDEX = 64 << 20
"""Bytes of the largest index that is taken over; reading one takes time in the engine's process."""


class OutlinesBackend(Backend):
    """Uses outlines-core. Grammars go to llguidance, as in outlines itself."""

    package = "outlines_core"

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._grammars: LLGuidanceBackend | None = None
        self._words = -(-len(vocabulary.tokens) // 32)

    def prepare(self) -> None:
        import outlines_core  # noqa: F401

    def check(self, spec: GuideSpec) -> bytes:
        if spec.kind == "grammar":
            return self._for_grammars().check(spec)
        from outlines_core import Index, Vocabulary

        by_bytes: dict[bytes, list[int]] = {}
        for index, token in enumerate(self.vocabulary.tokens):
            if token:
                by_bytes.setdefault(token, []).append(index)
        # Its call only takes keys of one type, so strings are given as bytes too.
        vocabulary = Vocabulary(self.vocabulary.eos_token_id, by_bytes)
        index = Index(expression_of(spec), vocabulary)
        payload: bytes = bytes(index.__reduce__()[1][0])
        if len(payload) > MAX_INDEX:
            raise GrammarError(
                f"needs an index of {len(payload) >> 20} MiB with this backend, more than {MAX_INDEX >> 20}; "
                "guided_decoding_backend llguidance needs none"
            )
        return payload

    def load(self, spec: GuideSpec, payload: bytes) -> Grammar:
        if spec.kind == "grammar":
            return self._for_grammars().load(spec, payload)
        from outlines_core import Index

        return _IndexGrammar(Index.from_binary(list(payload)), self, self._words, len(payload) * 2)

    def _for_grammars(self) -> LLGuidanceBackend:
        if self._grammars is None:
            self._grammars = LLGuidanceBackend(self.vocabulary)
        return self._grammars


class _IndexGrammar(Grammar):
    def __init__(self, index: Any, backend: OutlinesBackend, words: int, size: int) -> None:
        self.index = index
        self.eos = backend.vocabulary.eos_token_id
        self.size = size + (64 << 10)
        self.words = words

    def matcher(self) -> Matcher:
        return _IndexMatcher(self, self.index.get_initial_state())


class _IndexMatcher(Matcher):
    __slots__ = ("_grammar", "_state")

    def __init__(self, grammar: _IndexGrammar, state: int) -> None:
        self._grammar = grammar
        self._state = state

    def fill(self, words: np.ndarray) -> bool:
        grammar = self._grammar
        allowed = np.array(grammar.index.get_allowed_tokens(self._state) or [], dtype=np.int64)
        bits = np.zeros(grammar.words * 32, dtype=np.uint8)
        bits[allowed] = 1
        bits[grammar.eos] = 0
        words[:] = np.packbits(bits, bitorder="little").view(np.uint32)
        return bool(grammar.index.is_final_state(self._state))

    def advance(self, token_id: int) -> None:
        state = self._grammar.index.get_next_state(self._state, token_id)
        if state is None:
            raise GrammarError(f"does not allow token {token_id} here")
        self._state = state

    def copy(self) -> Matcher:
        return _IndexMatcher(self._grammar, self._state)
