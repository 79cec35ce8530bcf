"""The backend ``llguidance``: an Earley parser over lazily built automata, in Rust."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from aserve.guided.base import DEFAULT_WHITESPACE, Backend, Grammar, GrammarError, GuideSpec, Matcher
from aserve.guided.regex import full_match

_WORTH_THREADS = 4
"""Masks worth waking threads for: one takes some 50 microseconds."""

_MOST_THREADS = 8


class LLGuidanceBackend(Backend):
    package = "llguidance"
    extra = None
    timeout = 2.0

    def __init__(self, vocabulary: Any) -> None:
        super().__init__(vocabulary)
        from llguidance import LLParserLimits, LLTokenizer
        from llguidance._tokenizer import TokenizerWrapper

        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Tokens(vocabulary)),
            n_vocab=len(vocabulary.tokens),
            eos_token=vocabulary.eos_token_id,
        )
        # Automata grow while tokens are drawn, in the thread that computes everybody's steps: these
        # bound a step at a few milliseconds and a grammar's states (about 2 kB each) at some 40 MB.
        self._limits = LLParserLimits(
            step_lexer_fuel=100_000,
            step_max_items=50_000,
            max_lexer_states=20_000,
            max_grammar_size=200_000,
            verbose_errors=False,
        )

    def check(self, spec: GuideSpec) -> bytes:
        grammar = self.load(spec, b"")
        words = np.zeros(-(-len(self.vocabulary.tokens) // 32), dtype=np.uint32)
        if not grammar.matcher().fill(words) and not words.any():
            raise GrammarError("allows no output that this model can write")
        return b""

    def load(self, spec: GuideSpec, payload: bytes) -> Grammar:
        """Compiles here what ``check`` has compiled in the other process: these objects cannot be sent.

        The parser's own limits, the same in both places, bound it, and it gives up the GIL meanwhile.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, _grammar_text(spec), log_level=0, limits=self._limits)
        _refuse_error(matcher)
        return _LLGrammar(matcher, self.vocabulary.eos_token_id, 20 * len(spec.text) + (64 << 10))


class _Tokens:
    """What LLTokenizer asks of a tokenizer."""

    def __init__(self, vocabulary: Any) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id = vocabulary.eos_token_id
        self.bos_token_id = None
        # Without bytes of its own a special token could not be told from the others that have none.
        self.tokens = [
            token or b"\xff" + f"[{index}]".encode() for index, token in enumerate(vocabulary.tokens)
        ]
        self.special_token_ids = [index for index, token in enumerate(vocabulary.tokens) if not token]

    def __call__(self, text: bytes | str) -> list[int]:
        found: list[int] = self._vocabulary.encode(text.encode() if isinstance(text, str) else text)
        return found


class _LLGrammar(Grammar):
    def __init__(self, start: Any, eos: int, size: int) -> None:
        self._start = start
        self._eos = eos
        self.size = size

    def matcher(self) -> Matcher:
        return _LLMatcher(self._start.deep_copy(), self._eos)


class _LLMatcher(Matcher):
    __slots__ = ("_bit", "_matcher", "_word")

    def __init__(self, matcher: Any, eos: int) -> None:
        self._matcher = matcher
        self._word, self._bit = eos >> 5, np.uint32(1 << (eos & 31))

    def fill(self, words: np.ndarray) -> bool:
        matcher = self._matcher
        if matcher.is_stopped() and not matcher.is_error():
            words[:] = 0
            return True
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        _refuse_error(matcher)
        return self._take_end(words)

    def _take_end(self, words: np.ndarray) -> bool:
        may_end = bool(words[self._word] & self._bit)
        words[self._word] &= ~self._bit
        return may_end

    @classmethod
    def fill_all(cls, matchers: Sequence[Any], words: np.ndarray) -> list[bool | Exception]:
        """All masks in one call that gives up the GIL, on as many threads as the machine has to offer."""
        if len(matchers) < _WORTH_THREADS:
            return super().fill_all(matchers, words)
        stopped = [each._matcher.is_stopped() and not each._matcher.is_error() for each in matchers]
        going = [(each._matcher, i) for i, each in enumerate(matchers) if not stopped[i]]
        if going:
            _executor().unsafe_compute_mask_ptr(going, words.ctypes.data, words[0].nbytes, len(words))
        found: list[bool | Exception] = []
        for each, row, over in zip(matchers, words, stopped, strict=True):
            if over:
                row[:] = 0
                found.append(True)
                continue
            try:
                _refuse_error(each._matcher)
                found.append(each._take_end(row))
            except GrammarError as error:
                found.append(error)
        return found

    def accepts(self, token_id: int) -> bool:
        try:
            return bool(self._matcher.validate_tokens([token_id]) == 1)
        except Exception:  # told by fill, which is asked next
            return False

    def advance(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            _refuse_error(self._matcher)

    def copy(self) -> Matcher:
        other = _LLMatcher.__new__(_LLMatcher)
        other._matcher, other._word, other._bit = self._matcher.deep_copy(), self._word, self._bit
        return other


@cache
def _executor() -> Any:
    """Threads that compute masks, asleep until they are needed. They are the process's."""
    from llguidance import LLExecutor

    return LLExecutor(min(_MOST_THREADS, os.cpu_count() or 1))


def _refuse_error(matcher: Any) -> None:
    if matcher.is_error():
        raise GrammarError(f"cannot be used: {' '.join(matcher.get_error().split())[:300]}")


def _grammar_text(spec: GuideSpec) -> str:
    """The guide in llguidance's own notation."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    text: str
    if spec.kind in ("json", "json_object"):
        schema = spec.text or '{"type": "object"}'
        # An option in the schema would override ours; nobody else knows the keyword.
        if '"x-guidance"' in schema:
            raise GrammarError("must not contain the keyword x-guidance")
        pattern = DEFAULT_WHITESPACE if spec.whitespace_pattern is None else spec.whitespace_pattern
        text = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": pattern})
    elif spec.kind == "regex":
        text = LLMatcher.grammar_from_regex(full_match(spec.text))
    elif spec.kind == "choice":
        options = " | ".join(json.dumps(each, ensure_ascii=False) for each in json.loads(spec.text))
        text = LLMatcher.grammar_from_lark(f"start: {options}")
    else:
        text = LLMatcher.grammar_from_lark(any_to_lark(spec.text))
    return text
