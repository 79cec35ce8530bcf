"""Sampling parameters: how one request's tokens are chosen and when it ends."""

from __future__ import annotations

import enum
import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from aserve.errors import InvalidRequestError

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this mean "take the likeliest token"."""

LOGIT_BIAS_LIMIT = 100.0

LENGTH_PENALTY_LIMIT = 10.0
"""Far beyond what is of use, and far below what makes a score overflow."""

BEAM_LIMIT = 512
"""Most beams of one request."""

LogitsProcessor = Callable[..., Any]
"""``f(output_ids, row)`` or ``f(prompt_ids, output_ids, row)``, told apart by parameter count; ids are
lists of int, ``row`` a float32 tensor of shape [vocab_size]. Must return the row to go on with."""


class SamplingType(enum.IntEnum):
    """How a request's tokens are chosen."""

    GREEDY = 0
    RANDOM = 1
    RANDOM_SEED = 2
    BEAM = 3


@dataclass(frozen=True)
class GuidedParams:
    """What an output must look like, token by token. Exactly one of the first five is set.

    json: a JSON schema, as text or as what ``json.loads`` gives for an object.
    regex: a regular expression that the whole output matches.
    choice: strings of which the output is one.
    grammar: a context-free grammar, in Lark's notation or GBNF.
    json_object: any JSON object.
    backend: a guided decoding backend by name; None for the engine's own.
    whitespace_pattern: regular expression of the whitespace allowed between JSON's tokens.
    source: the field that errors name; by default ``guided_json`` and so on.

    Raises InvalidRequestError (a ValueError) naming the field in ``param``. Whether a schema, expression
    or grammar makes sense is found out when it is compiled, before the request is queued.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    backend: str | None = None
    whitespace_pattern: str | None = None
    source: str | None = field(default=None, repr=False, compare=False)
    kind: str = field(init=False, repr=False, compare=False)
    """Which of the five is set, by its name."""
    text: str = field(init=False, repr=False, compare=False)
    """What it is set to as text; JSON for ``json`` and ``choice``."""

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise self.refusal("json_object", "must be true or false")
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if self.json_object:
            given.append("json_object")
        if len(given) != 1:
            found = f"got {' and '.join(given)}" if given else "got none"
            raise InvalidRequestError(
                f"exactly one of json, regex, choice, grammar and json_object must guide the output, {found}",
                param=self.source or ("guided" if not given else f"guided_{given[-1]}"),
            )
        object.__setattr__(self, "kind", given[0])
        for name in ("regex", "grammar", "backend", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise self.refusal(name, "must be a string")
        if self.whitespace_pattern is not None and self.kind not in ("json", "json_object"):
            raise self.refusal("whitespace_pattern", "needs JSON to be asked for")
        # Taken now: a schema or a list that its caller changes later must not change this.
        object.__setattr__(self, "text", self._as_text())
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise self.refusal(self.kind, "must be Unicode text without lone surrogates") from None

    @property
    def param(self) -> str:
        """The field that errors about the guide itself name."""
        return self.source or f"guided_{self.kind}"

    def refusal(self, name: str, problem: str) -> InvalidRequestError:
        """An error about one of this object's fields."""
        special = {"backend": "guided_decoding_backend", "whitespace_pattern": "guided_whitespace_pattern"}
        param = special.get(name) or self.source or f"guided_{name}"
        return InvalidRequestError(f"{param} {problem}", param=param)

    def _as_text(self) -> str:
        if self.json_object:
            return ""
        if self.kind == "choice":
            if not (isinstance(self.choice, list) and self.choice):
                raise self.refusal("choice", "must be a list of at least one string")
            if not all(isinstance(each, str) and each for each in self.choice):
                raise self.refusal("choice", "must hold strings that are not empty")
            return json.dumps(self.choice, ensure_ascii=False)
        value = getattr(self, self.kind)
        if isinstance(value, str):
            if not value.strip():
                raise self.refusal(self.kind, "must not be empty")
            return value
        if not isinstance(value, dict):
            raise self.refusal(self.kind, "must be an object or a string")
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise self.refusal(self.kind, "must be made of JSON values, and not nested too deep") from None


@dataclass(repr=False)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Arguments are checked once, on construction; attributes may be changed afterwards and are then
    taken as they are. A temperature below 1e-5 means greedy, and resets ``top_p``, ``top_k`` and
    ``min_p`` to their neutral values.

    n: sequences returned.
    best_of: sequences generated, of which the ``n`` with the highest cumulative log-probability are
        returned; None means ``n``. The beam width when ``use_beam_search`` is set.
    presence_penalty: in [-2, 2]; subtracted once from the logit of every token already generated.
    frequency_penalty: in [-2, 2]; subtracted once per occurrence in the generated tokens.
    repetition_penalty: in (0, 2]; for tokens of the prompt or the output, a positive logit is divided
        by it and any other multiplied by it.
    temperature: >= 0; logits are divided by it.
    top_p: in (0, 1]; keep the smallest set of likeliest tokens whose mass reaches it.
    top_k: -1 for all, or >= 1; tokens tied with the k-th are kept too.
    min_p: in [0, 1]; drop tokens less likely than this fraction of the likeliest.
    seed: seed of this request's draws; None (or -1) draws from the engine's seed.
    use_beam_search, length_penalty, early_stopping: beam search, with ``temperature`` 0: the ``n`` best of
        ``best_of`` hypotheses are returned, best first, or as many as there are. A hypothesis' score is its
        cumulative log-probability divided by its number of output tokens, the last included, to the power of
        ``length_penalty``, in [-10, 10]. ``early_stopping`` True ends the search with ``best_of``
        hypotheses, False once the best beam would not make a better one if it ended now, "never" once it
        could not at any length. Outputs come whole, at the end.
    stop: strings that end the output; not part of it.
    stop_token_ids: tokens that end the output.
    include_stop_str_in_output: keep what ended the output, string or token, in its text.
    ignore_eos: go on after the end-of-sequence token.
    max_tokens: most tokens generated; None means up to the model's length.
    min_tokens: tokens generated before anything may end the output.
    logprobs: number of likeliest tokens whose log-probabilities are returned per generated token,
        besides the chosen one; None for none at all.
    prompt_logprobs: the same per prompt token.
    detokenize: make text; without it ``text`` stays "".
    skip_special_tokens: leave special tokens out of the text.
    spaces_between_special_tokens: acts only with slow tokenizers that have added tokens.
    logits_processors: see :data:`LogitsProcessor`; applied in order, after ``logit_bias``.
    truncate_prompt_tokens: keep only the last this many prompt tokens; applied by the HTTP server.
    logit_bias: token id -> value added to its logit, each clamped to [-100, 100].
    guided: what the output must look like; not with beam search.

    Raises InvalidRequestError (a ValueError) naming the field in ``param``.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logits_processors: list[LogitsProcessor] | None = None
    truncate_prompt_tokens: int | None = None
    logit_bias: dict[int, float] | None = None
    guided: GuidedParams | None = None

    def __post_init__(self) -> None:
        self._check_types()
        for name in _FLOATS:
            setattr(self, name, float(getattr(self, name)))
        self.best_of = self.n if self.best_of is None else self.best_of
        self.seed = None if self.seed == -1 else self.seed
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        self.stop_token_ids = list(self.stop_token_ids or ())
        if self.logit_bias is not None:
            self.logit_bias = _checked_bias(self.logit_bias)
        self._check_ranges()
        if self.use_beam_search:
            self._check_beam()
        else:
            self._check_not_beam()
            if self.temperature < GREEDY_TEMPERATURE:
                self.top_p, self.top_k, self.min_p = 1.0, -1, 0.0
                if self.best_of > 1:
                    name = "n" if self.n > 1 else "best_of"
                    raise _refusal(name, "1 when temperature is 0 (greedy)", getattr(self, name))

    @property
    def sampling_type(self) -> SamplingType:
        if self.use_beam_search:
            return SamplingType.BEAM
        if self.temperature < GREEDY_TEMPERATURE:
            return SamplingType.GREEDY
        return SamplingType.RANDOM if self.seed is None else SamplingType.RANDOM_SEED

    @property
    def only_likeliest(self) -> bool:
        """Whether a token is the one with the largest logit, and nothing is asked about the others."""
        return (
            self.sampling_type is SamplingType.GREEDY
            and self.logprobs is None
            and self.prompt_logprobs is None
            and self.min_tokens == 0
            and self.guided is None
            and not self.logit_bias
            and not self.logits_processors
            and (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) == (1, 0, 0)
        )

    def clone(self) -> SamplingParams:
        """A deep copy that shares the logits processors, which may hold state or refuse to be copied."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        # The other fields cannot be changed in place.
        for name in ("stop", "stop_token_ids", "logit_bias", "logits_processors"):
            value = getattr(self, name)
            if isinstance(value, (list, dict)):
                setattr(other, name, value.copy())
        return other

    def __repr__(self) -> str:
        shown = (f.name for f in fields(self) if f.name not in ("detokenize", "logits_processors"))
        return f"SamplingParams({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def _check_types(self) -> None:
        for name in _INTS:
            if not _is_int(getattr(self, name)):
                raise _refusal(name, "an integer", getattr(self, name))
        for name in _OPTIONAL_INTS:
            if getattr(self, name) is not None and not _is_int(getattr(self, name)):
                raise _refusal(name, "an integer or null", getattr(self, name))
        for name in _FLOATS:
            if not _is_finite(getattr(self, name)):
                raise _refusal(name, "a finite number", getattr(self, name))
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise _refusal(name, "true or false", getattr(self, name))
        if not isinstance(self.stop, str) and not _is_list_of(self.stop, lambda s: isinstance(s, str)):
            raise _refusal("stop", "a string or a list of strings", self.stop)
        if not _is_list_of(self.stop_token_ids, _is_int):
            raise _refusal("stop_token_ids", "a list of integers", self.stop_token_ids)
        if not _is_list_of(self.logits_processors, callable):
            raise _refusal("logits_processors", "a list of callables", self.logits_processors)
        if self.guided is not None and not isinstance(self.guided, GuidedParams):
            raise _refusal("guided", "GuidedParams or null", self.guided)

    def _check_ranges(self) -> None:
        values = self.__dict__
        for name, holds, wanted in _RANGES:
            if not holds(values[name]):
                raise _refusal(name, wanted, values[name])
            if name == "n" and self.best_of is not None and self.best_of < self.n:
                raise _refusal("best_of", f"at least n ({self.n})", self.best_of)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refusal("min_tokens", f"at most max_tokens ({self.max_tokens})", self.min_tokens)
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize to be true", param="stop")

    def _check_beam(self) -> None:
        if self.best_of is None or self.best_of <= 1:
            raise _refusal("best_of", "above 1 (the beam width) with beam search", self.best_of)
        if self.temperature >= GREEDY_TEMPERATURE:
            raise _refusal("temperature", "0 with beam search", self.temperature)
        if self.top_p < 1.0 - GREEDY_TEMPERATURE:
            raise _refusal("top_p", "1 with beam search", self.top_p)
        if self.top_k != -1:
            raise _refusal("top_k", "-1 with beam search", self.top_k)
        if self.min_p != 0.0:
            raise _refusal("min_p", "0 with beam search", self.min_p)
        if not -LENGTH_PENALTY_LIMIT <= self.length_penalty <= LENGTH_PENALTY_LIMIT:
            limit = LENGTH_PENALTY_LIMIT
            raise _refusal("length_penalty", f"in [-{limit:g}, {limit:g}]", self.length_penalty)
        if self.best_of > BEAM_LIMIT:
            raise _refusal("best_of", f"at most {BEAM_LIMIT} with beam search", self.best_of)
        # Every beam has to look at as many more tokens as there are that may end it.
        most = max(1, 2 * BEAM_LIMIT // self.best_of - 1)
        if len(set(self.stop_token_ids or ())) > most:
            raise InvalidRequestError(
                f"stop_token_ids may name {most} tokens with beam search and best_of={self.best_of}",
                param="stop_token_ids",
            )
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise _refusal("early_stopping", 'true, false or "never"', self.early_stopping)
        if self.guided is not None:
            param = self.guided.param
            raise InvalidRequestError(f"{param} cannot be combined with beam search", param=param)

    def _check_not_beam(self) -> None:
        if self.early_stopping is not False:
            raise _refusal("early_stopping", "false without beam search", self.early_stopping)
        if self.length_penalty != 1.0:
            raise _refusal("length_penalty", "1.0 without beam search", self.length_penalty)


_INTS = ("n", "top_k", "min_tokens")
_OPTIONAL_INTS = ("best_of", "seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
_FLOATS = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "min_p",
    "length_penalty",
)
_BOOLS = (
    "use_beam_search",
    "include_stop_str_in_output",
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("n", lambda v: v >= 1, "at least 1"),
    ("presence_penalty", lambda v: -2.0 <= v <= 2.0, "in [-2, 2]"),
    ("frequency_penalty", lambda v: -2.0 <= v <= 2.0, "in [-2, 2]"),
    ("repetition_penalty", lambda v: 0.0 < v <= 2.0, "in (0, 2]"),
    ("temperature", lambda v: v >= 0.0, "at least 0"),
    ("top_p", lambda v: 0.0 < v <= 1.0, "in (0, 1]"),
    ("top_k", lambda v: v == -1 or v >= 1, "-1 (all) or at least 1"),
    ("min_p", lambda v: 0.0 <= v <= 1.0, "in [0, 1]"),
    ("max_tokens", lambda v: v is None or v >= 1, "at least 1"),
    ("min_tokens", lambda v: v >= 0, "at least 0"),
    ("logprobs", lambda v: v is None or v >= 0, "at least 0"),
    ("prompt_logprobs", lambda v: v is None or v >= 0, "at least 0"),
    ("truncate_prompt_tokens", lambda v: v is None or v >= 1, "at least 1"),
    ("stop", lambda v: "" not in v, "free of empty strings"),
)


def _refusal(name: str, wanted: str, value: Any) -> InvalidRequestError:
    # reprlib keeps a hostile value (a huge list, a huge integer) out of the message.
    return InvalidRequestError(f"{name} must be {wanted}, got {reprlib.repr(value)}", param=name)


def _is_int(value: Any) -> bool:
    # bool is an int to Python; n=True is a mistake all the same.
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if not isinstance(value, float) and not _is_int(value):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a float
        return False


def _is_list_of(value: Any, holds: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, (list, tuple, set, frozenset)) and all(map(holds, value)))


def _checked_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, dict):
        raise _refusal("logit_bias", "a map from token id to number", bias)
    checked: dict[int, float] = {}
    for key, value in bias.items():
        # JSON has string keys only.
        digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 19
        token_id = int(key) if digits else key
        if not _is_int(token_id) or token_id < 0:
            raise _refusal("logit_bias", "keyed by token ids", key)
        if not _is_finite(value):
            raise _refusal("logit_bias", f"a finite number for token {token_id}", value)
        checked[token_id] = max(-LOGIT_BIAS_LIMIT, min(LOGIT_BIAS_LIMIT, float(value)))
    return checked
