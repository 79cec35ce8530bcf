"""The state of a request while it is being served."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from aserve.core.beam_state import BeamState
from aserve.messages.inputs import LoRARequest, PoolingParams
from aserve.messages.outputs import FINISH_ABORT, FINISH_LENGTH, FINISH_STOP
from aserve.messages.params import SamplingParams
from aserve.messages.step import SampleLogprobs

_MASK64 = (1 << 64) - 1


class SequenceStatus(enum.IntEnum):
    """Ordered: everything from FINISHED_STOPPED on has ended."""

    WAITING = 0
    RUNNING = 1
    FINISHED_STOPPED = 2
    FINISHED_LENGTH = 3
    FINISHED_IGNORED = 4
    FINISHED_ABORTED = 5
    FINISHED_FAILED = 6

    @property
    def finished(self) -> bool:
        return self >= SequenceStatus.FINISHED_STOPPED


FINISH_REASONS = {
    SequenceStatus.FINISHED_STOPPED: FINISH_STOP,
    SequenceStatus.FINISHED_LENGTH: FINISH_LENGTH,
    SequenceStatus.FINISHED_IGNORED: FINISH_LENGTH,
    SequenceStatus.FINISHED_ABORTED: FINISH_ABORT,
    SequenceStatus.FINISHED_FAILED: FINISH_ABORT,
}


def mix64(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): spreads every bit over all 64."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


class Sequence:
    """One line of tokens.

    Three counters say everything about its progress::

        |---------------- token_ids ----------------|- in_flight -|
        |------ num_computed ------|----- to compute next --------|

    ``num_computed`` tokens have their keys and values in the cache, or will have once the plans
    already issued have run. ``in_flight`` tokens were asked for in issued plans and exist or will exist
    on the worker, but their value is not known here yet. A sequence needs work exactly while
    ``num_known > num_computed``; computing the last known token yields the next one.

    ``blocks`` is its block table, ``swapped_blocks`` its table in host memory while it is swapped out.
    The first ``num_slid`` blocks have left the model's window, the first ``num_published`` can be found
    by others; ``block_keys`` are the names of its first blocks there, as far as anybody asked.
    """

    __slots__ = (
        "block_keys",
        "blocks",
        "cumulative_logprob",
        "group",
        "in_flight",
        "index",
        "max_known",
        "num_computed",
        "num_prompt_tokens",
        "num_published",
        "num_slid",
        "seq_id",
        "slot",
        "status",
        "stop_reason",
        "swapped_blocks",
        "token_ids",
    )

    def __init__(self, seq_id: int, index: int, group: SequenceGroup, token_ids: list[int]) -> None:
        self.seq_id = seq_id
        self.index = index
        self.group = group
        self.token_ids = token_ids
        self.num_prompt_tokens = group.num_prompt_tokens
        self.num_computed = 0
        self.in_flight = 0
        self.blocks: list[int] = []
        self.swapped_blocks: list[int] = []
        self.block_keys: list[bytes] = []
        self.num_published = 0
        self.num_slid = 0
        self.slot = -1
        self.status = SequenceStatus.WAITING
        self.stop_reason: int | str | None = None
        self.cumulative_logprob = 0.0
        self.max_known = group.max_known

    @property
    def num_known(self) -> int:
        return len(self.token_ids) + self.in_flight

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def finished(self) -> bool:
        return self.status >= SequenceStatus.FINISHED_STOPPED

    @property
    def finish_reason(self) -> str | None:
        return FINISH_REASONS.get(self.status)

    @property
    def rng_seed(self) -> int:
        """Seed of this sequence's draws; siblings of one request differ."""
        return mix64(self.group.rng_base ^ mix64(self.index + 1))

    def fork(self, seq_id: int, index: int) -> Sequence:
        """A copy with its own tokens that shares this sequence's blocks (references not counted here)."""
        child = Sequence(seq_id, index, self.group, list(self.token_ids))
        child.num_computed = self.num_computed
        child.in_flight = self.in_flight
        child.blocks = list(self.blocks)
        child.swapped_blocks = list(self.swapped_blocks)
        child.block_keys = list(self.block_keys)
        child.num_published = self.num_published
        child.num_slid = self.num_slid
        child.status = self.status
        child.cumulative_logprob = self.cumulative_logprob
        return child


@dataclass(eq=False, slots=True)
class SequenceGroup:
    """A request: one prompt, ``params.best_of`` sequences once the prompt has been computed.

    With beam search those are the running beams, and in the end the hypotheses, best first.

    eos_token_id: ends a sequence unless ``params.ignore_eos``; None when unknown.
    max_model_len: a sequence ends once it is longer than this.
    rng_base: the request's seed, or one drawn by the engine.
    priority: requests with a lower one come first.
    deadline: when the request is given up, on the clock ``Scheduler.schedule`` is told.
    cache_salt: the prefix cache is shared only among requests with an equal one.
    image_hash: stands for the image that the prompt's image tokens mean.
    swapped: whether it waits with its keys and values in host memory.
    pooling: set for a request that ends when its prompt is computed, with a vector instead of tokens;
        ``params`` then allow one token.
    num_cached_tokens: prompt tokens that were not computed because the prefix cache had them; None
        before the request has started.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float
    max_model_len: int
    rng_base: int
    eos_token_id: int | None = None
    lora_request: LoRARequest | None = None
    priority: int = 0
    deadline: float | None = None
    cache_salt: str | None = None
    image_hash: bytes | None = None
    seqs: list[Sequence] = field(default_factory=list)
    number: int = 0
    """Grows from one request queued to the next."""
    expanded: bool = False
    """Whether all sequences there will be exist; never of beams, which come and go."""
    beam: BeamState | None = None
    reserved_slots: list[int] = field(default_factory=list)
    prompt_logprobs: list[SampleLogprobs] = field(default_factory=list)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_preemptions: int = 0
    swapped: bool = False
    num_cached_tokens: int | None = None
    grammar: Any = None
    """What the outputs are matched with in the worker, if ``params.guided`` is set."""
    stop_ids: frozenset[int] = frozenset()
    max_known: int = 0
    width: int = 1
    repeats: bool = False
    """Whether nothing but the likeliest token is asked for, and nothing outside looks at each as it comes."""
    pooling: PoolingParams | None = None

    def __post_init__(self) -> None:
        params = self.params
        self.width = params.best_of or params.n
        room = self.max_model_len + 1
        if params.max_tokens is not None:
            room = min(room, len(self.prompt_token_ids) + params.max_tokens)
        self.max_known = room
        self.stop_ids = frozenset(params.stop_token_ids or ())
        self.expanded = self.width == 1
        if params.use_beam_search:
            self.beam = BeamState(self)
        self.repeats = self.width == 1 and self.pooling is None and not params.stop and params.only_likeliest

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def finished(self) -> bool:
        return all(seq.status >= SequenceStatus.FINISHED_STOPPED for seq in self.seqs)

    @property
    def unfinished(self) -> list[Sequence]:
        return [seq for seq in self.seqs if seq.status < SequenceStatus.FINISHED_STOPPED]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities are asked for and not all here yet."""
        if self.params.prompt_logprobs is None:
            return False
        return len(self.prompt_logprobs) < len(self.prompt_token_ids) - 1

    def check_stop(self, seq: Sequence) -> None:
        """Ends ``seq`` if its last token, or its length, says so. Stop strings are checked elsewhere."""
        params = self.params
        token = seq.token_ids[-1]
        may_stop = seq.num_output_tokens >= params.min_tokens
        if may_stop and token == self.eos_token_id and not params.ignore_eos:
            seq.status = SequenceStatus.FINISHED_STOPPED
        elif may_stop and token in self.stop_ids:
            seq.status = SequenceStatus.FINISHED_STOPPED
            seq.stop_reason = token
        elif len(seq.token_ids) >= self.max_known:
            seq.status = SequenceStatus.FINISHED_LENGTH
