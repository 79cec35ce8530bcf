"""The backend ``lm-format-enforcer``: an automaton over characters, applied to the vocabulary as needed."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import numpy as np

from aserve.guided.base import Backend, Grammar, GrammarError, GuideSpec, Matcher, Vocabulary
from aserve.guided.expression import expression_of
from aserve.guided.llguidance import LLGuidanceBackend

_DEAD = 0
"""Row of the table that no character leads out of."""

MAX_STATES = 20_000


class LMFormatEnforcerBackend(Backend):
    """Uses the package's parser of expressions. Grammars, which it has none of, go to llguidance.

    The package's own walk over the vocabulary, a tree of Python objects, takes 0.3 s for a state that
    allows free text, in the thread that computes everybody's steps; here it is a few operations on
    arrays, and its result is kept.
    """

    package = "lmformatenforcer"

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._grammars: LLGuidanceBackend | None = None
        self._texts: _Texts | None = None
        self._lock = threading.Lock()

    def prepare(self) -> None:
        # The package imports torch if it can, for something not used here: seconds, and 300 MB. This is
        # the compiling process, which has no other use for it either.
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
        import lmformatenforcer  # noqa: F401

    def check(self, spec: GuideSpec) -> bytes:
        if spec.kind == "grammar":
            return self._for_grammars().check(spec)
        from interegular.fsm import anything_else
        from lmformatenforcer import RegexParser

        automaton = RegexParser(expression_of(spec)).context.pattern
        if len(automaton.map) > MAX_STATES:
            raise GrammarError(f"needs {len(automaton.map)} states with this backend, more than {MAX_STATES}")
        symbols = {
            "" if symbol is anything_else else symbol: column for symbol, column in automaton.alphabet.items()
        }
        # A character that no token is: spelled in pieces, which this backend cannot tell apart.
        usable = {column for symbol, column in symbols.items() if not symbol or self._spells(symbol)}
        numbers = {state: place for place, state in enumerate(sorted(_live(automaton, usable)), _DEAD + 1)}
        if automaton.initial not in numbers:
            raise GrammarError(
                "allows no output made of characters that this model has as tokens; "
                "guided_decoding_backend llguidance can spell them in pieces"
            )
        return json.dumps(
            {
                "symbols": symbols,
                "moves": [
                    [numbers[state], column, numbers[after]]
                    for state in numbers
                    for column, after in automaton.map.get(state, {}).items()
                    if after in numbers
                ],
                "states": len(numbers) + 1,
                "initial": numbers[automaton.initial],
                "finals": [numbers[state] for state in automaton.finals if state in numbers],
            }
        ).encode()

    def load(self, spec: GuideSpec, payload: bytes) -> Grammar:
        if spec.kind == "grammar":
            return self._for_grammars().load(spec, payload)
        with self._lock:
            if self._texts is None:
                self._texts = _Texts(self.vocabulary)
        return _AutomatonGrammar(json.loads(payload), self._texts)

    def _spells(self, character: str) -> bool:
        return character.encode() in self.vocabulary.ids

    def _for_grammars(self) -> LLGuidanceBackend:
        if self._grammars is None:
            self._grammars = LLGuidanceBackend(self.vocabulary)
        return self._grammars


def _live(automaton: Any, columns: set[int]) -> set[int]:
    """States from which the end can be reached by these columns."""
    before: dict[int, list[int]] = {}
    for state, moves in automaton.map.items():
        for column, after in moves.items():
            if column in columns:
                before.setdefault(after, []).append(state)
    found, open_states = set(automaton.finals), list(automaton.finals)
    while open_states:
        for state in before.get(open_states.pop(), ()):
            if state not in found:
                found.add(state)
                open_states.append(state)
    return found


class _Texts:
    """The vocabulary as characters: those tokens that are whole characters, and may be part of a text.

    groups: by length L, token ids int64 ``[N]`` and their characters int32 ``[N, L]``.
    text: the same by token.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        texts: list[tuple[int, str]] = []
        for index, token in enumerate(vocabulary.tokens):
            try:
                text = token.decode()
            except UnicodeDecodeError:
                continue
            if text and index != vocabulary.eos_token_id:
                texts.append((index, text))
        texts.sort(key=lambda each: len(each[1]))
        self.size = len(vocabulary.tokens)
        self.groups: list[tuple[np.ndarray, np.ndarray]] = []
        start = 0
        while start < len(texts):
            length = len(texts[start][1])
            end = start
            while end < len(texts) and len(texts[end][1]) == length:
                end += 1
            joined = "".join(text for _, text in texts[start:end])
            codes = np.frombuffer(joined.encode("utf-32-le"), dtype=np.int32).reshape(-1, length)
            self.groups.append((np.array([index for index, _ in texts[start:end]]), codes))
            start = end
        self.text = dict(texts)


class _AutomatonGrammar(Grammar):
    def __init__(self, parts: dict[str, Any], texts: _Texts) -> None:
        symbols: dict[str, int] = parts["symbols"]
        self._symbols = symbols
        self._others = symbols.get("", -1)
        columns = max(symbols.values(), default=0) + 1
        # One column more: characters that the automaton does not have at all.
        self.table = np.zeros((parts["states"], columns + 1), dtype=np.int32)
        moves = np.array(parts["moves"], dtype=np.int64).reshape(-1, 3)
        self.table[moves[:, 0], moves[:, 1]] = moves[:, 2]
        self._others = columns if self._others < 0 else self._others
        known = np.array([ord(each) for each in symbols if each], dtype=np.int64)
        self._classes = np.full(int(known.max(initial=0)) + 2, self._others, dtype=np.int32)
        self._classes[known] = [symbols[each] for each in symbols if each]
        self.initial: int = parts["initial"]
        self.finals = frozenset(parts["finals"])
        self.texts = texts
        self._columns = [
            self._classes[np.minimum(codes, len(self._classes) - 1)] for _, codes in texts.groups
        ]
        self._masks: dict[int, np.ndarray] = {}
        held = sum(each.nbytes for each in self._columns)
        self._most_masks = max(16, (16 << 20) // (texts.size // 8 + 1))
        self.size = self.table.nbytes + held + self._most_masks * (texts.size // 8)

    def matcher(self) -> Matcher:
        return _AutomatonMatcher(self, self.initial)

    def mask(self, state: int) -> np.ndarray:
        """Tokens that lead somewhere from ``state``: uint32 ``[ceil(V / 32)]``."""
        found = self._masks.get(state)
        if found is None:
            bits = np.zeros(-(-self.texts.size // 32) * 32, dtype=np.uint8)
            for (ids, _), columns in zip(self.texts.groups, self._columns, strict=True):
                alive = np.flatnonzero(self.table[state, columns[:, 0]])
                states = self.table[state, columns[alive, 0]]
                for place in range(1, columns.shape[1]):
                    states = self.table[states, columns[alive, place]]
                    going = np.flatnonzero(states)
                    alive, states = alive[going], states[going]
                bits[ids[alive]] = 1
            found = np.packbits(bits, bitorder="little").view(np.uint32)
            if len(self._masks) >= self._most_masks:
                self._masks.pop(next(iter(self._masks)))
            self._masks[state] = found
        return found

    def follow(self, state: int, text: str) -> int:
        for character in text:
            state = int(self.table[state, self._symbols.get(character, self._others)])
        return state


class _AutomatonMatcher(Matcher):
    __slots__ = ("_grammar", "_state")

    def __init__(self, grammar: _AutomatonGrammar, state: int) -> None:
        self._grammar = grammar
        self._state = state

    def fill(self, words: np.ndarray) -> bool:
        words[:] = self._grammar.mask(self._state)
        return self._state in self._grammar.finals

    def advance(self, token_id: int) -> None:
        text = self._grammar.texts.text.get(token_id)
        state = _DEAD if text is None else self._grammar.follow(self._state, text)
        if state == _DEAD:
            raise GrammarError(f"does not allow token {token_id} here")
        self._state = state

    def copy(self) -> Matcher:
        return _AutomatonMatcher(self._grammar, self._state)
