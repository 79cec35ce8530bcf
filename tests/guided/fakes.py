"""A backend that does what it is told, in the compiling process; and the grammar of one fixed output."""

from __future__ import annotations

import os
import signal
import time

import numpy as np

from aserve.guided import base


class Backend(base.Backend):
    package = "json"

    def check(self, spec: base.GuideSpec) -> bytes:
        order, _, argument = spec.text.partition(" ")
        if order == "sleep":
            time.sleep(float(argument))
        elif order == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif order == "exhaust":
            return b"x" * (8 << 30)
        elif order == "raise":
            raise RuntimeError(argument)
        elif order == "print":
            print("not an answer", flush=True)
        return f"{os.getpid()}".encode()

    def load(self, spec: base.GuideSpec, payload: bytes) -> base.Grammar:
        grammar = FixedOutput([])
        grammar.size = 1 << 20
        grammar.pid = int(payload)
        return grammar


class FixedOutput(base.Grammar):
    """Allows one sequence of tokens. ``fails_at``: how many tokens in its matcher breaks."""

    pid = 0
    fails_with: type[Exception] = base.GrammarError

    def __init__(self, tokens: list[int], fails_at: int = -1) -> None:
        self.tokens = tokens
        self.fails_at = fails_at

    def matcher(self) -> base.Matcher:
        return _FixedMatcher(self, 0)


class _FixedMatcher(base.Matcher):
    def __init__(self, grammar: FixedOutput, at: int) -> None:
        self.grammar = grammar
        self.at = at

    def fill(self, words: np.ndarray) -> bool:
        if self.at == self.grammar.fails_at:
            raise self.grammar.fails_with("broke")
        words[:] = 0
        if self.at == len(self.grammar.tokens):
            return True
        token = self.grammar.tokens[self.at]
        words[token >> 5] = np.uint32(1 << (token & 31))
        return False

    def advance(self, token_id: int) -> None:
        if token_id != self.grammar.tokens[self.at]:
            raise base.GrammarError(f"expected {self.grammar.tokens[self.at]}, got {token_id}")
        self.at += 1

    def copy(self) -> base.Matcher:
        return _FixedMatcher(self.grammar, self.at)
