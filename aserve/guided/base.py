"""What every guided decoding backend offers."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from aserve.messages.params import GuidedParams

if TYPE_CHECKING:
    import numpy as np

DEFAULT_WHITESPACE = "[ ]?"
"""Between JSON's tokens: at most one space, or a model could fill its output with blanks."""


class GrammarError(Exception):
    """A guide makes no sense, is too expensive, or asks for what its backend cannot do.

    The message goes to the caller and continues a sentence that starts with the field's name.
    of_caller: that it is the caller's fault.
    """

    of_caller = True


class TooExpensiveError(GrammarError):
    """Compiling took too long or ended its process, which may be the machine's fault: not remembered."""


class GuideSpec(NamedTuple):
    """A guide as it is compiled and cached; ``kind`` and ``text`` as in GuidedParams."""

    backend: str
    kind: str
    text: str
    whitespace_pattern: str | None

    @classmethod
    def of(cls, guided: GuidedParams, default_backend: str) -> GuideSpec:
        return cls(guided.backend or default_backend, guided.kind, guided.text, guided.whitespace_pattern)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a model, as bytes.

    tokens: by id, as many as the model has logits; b"" for those that stand for no text, which are never
        part of a guided output: special tokens, padding of the vocabulary, bytes that nobody knows.
    eos_token_id: ends an output.
    """

    tokens: list[bytes]
    eos_token_id: int

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """Token ids by bytes; the lowest where several are alike."""
        found: dict[bytes, int] = {}
        for index, token in enumerate(self.tokens):
            if token:
                found.setdefault(token, index)
        return found

    @cached_property
    def textless(self) -> frozenset[int]:
        """Tokens that stand for no text."""
        return frozenset(index for index, token in enumerate(self.tokens) if not token)

    @cached_property
    def longest(self) -> int:
        return max(map(len, self.tokens))

    def encode(self, text: bytes) -> list[int]:
        """Some tokens that spell ``text``, the longest first; bytes without a token are left out."""
        found, at = [], 0
        while at < len(text):
            for end in range(min(len(text), at + self.longest), at, -1):
                token = self.ids.get(text[at:end])
                if token is not None:
                    found.append(token)
                    at = end
                    break
            else:
                at += 1
        return found


class Matcher(ABC):
    """How far one output has come in its grammar. Used from one thread at a time."""

    @abstractmethod
    def fill(self, words: np.ndarray) -> bool:
        """Writes the tokens that may come next into ``words``, and tells whether the output may end.

        words: uint32 ``[ceil(V / 32)]``, overwritten; token ``i`` is bit ``i % 32`` of word ``i // 32``.
            The bit of the end-of-sequence token is left 0.
        Raises GrammarError if the backend's own limits are exceeded.
        """

    @classmethod
    def fill_all(cls, matchers: Sequence[Any], words: np.ndarray) -> list[bool | Exception]:
        """:meth:`fill` for many matchers of this class, and rows of ``words`` (uint32 ``[M, ceil(V / 32)]``).

        Returns for each whether it may end, or what it raised.
        """
        found: list[bool | Exception] = []
        for matcher, row in zip(matchers, words, strict=True):
            try:
                found.append(matcher.fill(row))
            except Exception as error:  # a backend's failure is its row's alone
                found.append(error)
        return found

    def accepts(self, token_id: int) -> bool:
        """Whether a token that is not an end of sequence may come next, if that can be told for much less
        than :meth:`fill` costs; False where it cannot. Never raises."""
        return False

    @abstractmethod
    def advance(self, token_id: int) -> None:
        """Takes a drawn token that is not an end of sequence. Raises GrammarError if it was not allowed."""

    @abstractmethod
    def copy(self) -> Matcher:
        """A matcher in the same state, independent of this one."""


class Grammar(ABC):
    """A compiled guide, shared by any number of outputs."""

    size: int = 0
    """Bytes of memory it is counted with in the cache."""
    textless: frozenset[int] = frozenset()
    """Tokens that stand for no text. Set by the compiler."""

    @abstractmethod
    def matcher(self) -> Matcher:
        """A matcher at the start of an output."""


class Backend(ABC):
    """Compiles guides for one vocabulary, in two steps.

    ``check`` runs in a process of its own that may be killed, and does all that may take long;
    ``load`` makes the grammar from what it returned, in a thread of the engine's process.
    """

    package: ClassVar[str]
    """The package that must be importable."""
    extra: ClassVar[str | None] = "guided"
    """The extra of aserve that installs it."""
    timeout: ClassVar[float] = 20.0
    """Seconds that compiling a guide may take where the configuration does not say."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    @classmethod
    def missing(cls) -> str | None:
        """What to do about a package that is not installed; None if all is there."""
        if importlib.util.find_spec(cls.package) is not None:
            return None
        wanted = f"aserve[{cls.extra}]" if cls.extra else cls.package
        return f"needs the package {cls.package.replace('_', '-')}; pip install '{wanted}'"

    def prepare(self) -> None:  # noqa: B027 - nothing to do for most
        """Called once before ``check``, in the process that calls it: imports what takes long."""

    @abstractmethod
    def check(self, spec: GuideSpec) -> bytes:
        """Compiles a guide. Raises GrammarError; other exceptions count as the guide's fault too."""

    @abstractmethod
    def load(self, spec: GuideSpec, payload: bytes) -> Grammar:
        """The grammar of a guide that ``check`` returned ``payload`` for. Called from any thread."""
