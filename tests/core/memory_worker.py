"""A worker that computes nothing but remembers everything.

Every cache cell holds the exact prefix of tokens it was written for. Before a row draws, each cell
its block table names is compared with the prefix the row should be seeing, so a block freed too
early, shared too long, copied too late or listed in the wrong place is caught at the first read.
The drawn token is a hash of that prefix and the sequence's seed: any two correct schedules of the
same request give the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from random import Random

import numpy as np

from aserve.core.sequence import mix64
from aserve.messages.step import SampleLogprobs, StepPlan, StepResult

VOCAB = 64


def prefix_hash(previous: int, token: int) -> int:
    return mix64(previous * 31 + token + 1)


def draw(prefix: int, rng_seed: int) -> int:
    return mix64(prefix ^ rng_seed) % VOCAB


@lru_cache(maxsize=10_000)
def likeliest(prefix: int) -> tuple[list[int], list[float]]:
    """The next tokens of beams, likeliest first, and their log-probabilities, from 0 down to -6."""
    # So many digits that two sums of such numbers are as good as never equal.
    uniform = Random(prefix).random
    scored = sorted((6.0 * uniform(), token) for token in range(VOCAB))
    return [token for _, token in scored], [-cost for cost, _ in scored]


def vector(prefix: int) -> np.ndarray:
    """What stands for the final hidden state of a prefix."""
    return np.array([prefix >> shift & 0xFF for shift in (0, 8, 16, 24)], dtype=np.float32)


class MemoryWorker:
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        num_swap_blocks: int = 0,
        window: int | None = None,
        lookahead: int = 0,
    ) -> None:
        self.block_size = block_size
        self.window = window
        self.lookahead = lookahead
        self.cells: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.swapped: list[list[int | None]] = [[None] * block_size for _ in range(num_swap_blocks)]
        self.tokens: list[list[int]] = [[] for _ in range(num_slots)]
        self.tables: list[list[int]] = [[] for _ in range(num_slots)]
        self.seeds = [0] * num_slots
        self.prompt_logprobs: list[int | None] = [None] * num_slots
        self.plans = 0
        self.ends: list[int | None] = [None] * num_slots
        self.pooled = [False] * num_slots
        self.candidates = [0] * num_slots

    def run(self, plan: StepPlan) -> StepResult:
        if plan.step_id != self.plans:
            raise AssertionError(f"plan {plan.step_id} came as number {self.plans}")
        self.plans += 1
        for new in plan.new:
            self.tokens[new.slot] = list(new.token_ids)
            self.tables[new.slot] = list(new.block_ids)
            self.seeds[new.slot] = new.rng_seed
            self.pooled[new.slot] = new.pooled
            self.candidates[new.slot] = new.candidates and max(new.candidates, new.params.logprobs or 0)
            wanted = new.want_prompt_logprobs and new.params.prompt_logprobs is not None
            self.prompt_logprobs[new.slot] = new.num_prompt_tokens if wanted else None
            self.ends[new.slot] = None if new.params.ignore_eos else new.eos_token_id
        for fork in plan.forks:
            self.tokens[fork.slot] = self.tokens[fork.parent_slot][: fork.num_tokens]
            self.tables[fork.slot] = list(fork.block_ids)
            self.seeds[fork.slot] = fork.rng_seed
            self.prompt_logprobs[fork.slot] = None
            self.pooled[fork.slot] = False
            self.candidates[fork.slot] = self.candidates[fork.parent_slot]
        for slot, position, token in plan.chosen:
            # A beam that was told anew after it had reported has nothing there yet.
            if None in self.tokens[slot][:position] or position > len(self.tokens[slot]):
                raise AssertionError(f"slot {slot} is not at position {position}")
            self.tokens[slot][position:] = [token]
        for slot, blocks in plan.new_blocks:
            self.tables[slot].extend(blocks)
        for slot, index, block in plan.replaced_blocks:
            self.tables[slot][index] = block
        if len({there for _, there in plan.swap_outs}) < len(plan.swap_outs):
            raise AssertionError("two blocks are to be moved to one swap block")
        for here, there in plan.swap_outs:
            self.swapped[there] = list(self.cells[here])
        for there, here in plan.swap_ins:
            self.cells[here] = list(self.swapped[there])
        for source, destination in plan.block_copies:
            self.cells[destination] = list(self.cells[source])
        # Any number up to the most is right.
        most = 1 + mix64(plan.step_id) % plan.max_steps
        drawn: list[int] = []
        self.details: dict[int, SampleLogprobs] = {}
        for steps in range(1, most + 1):
            new, pooled = self._step(plan, steps - 1)
            drawn += new
            if any(token == self.ends[slot] for token, (_, slot) in zip(new, plan.samples, strict=True)):
                break
        prompt_logprobs = {}
        for row, slot in enumerate(plan.slots):
            limit = self.prompt_logprobs[slot]
            if limit is not None:
                start = plan.starts[row]
                end = min(start + plan.counts[row], limit - 1)
                if end > start:
                    prompt_logprobs[row] = [
                        SampleLogprobs(-float(self.tokens[slot][i + 1]), i + 1, [], [])
                        for i in range(start, end)
                    ]
        return StepResult(
            plan.step_id,
            drawn,
            [-1.0] * len(drawn),
            details=self.details or None,
            prompt_logprobs=prompt_logprobs or None,
            pooled=pooled or None,
            steps=steps,
        )

    def _step(self, plan: StepPlan, done: int) -> tuple[list[int], dict[int, np.ndarray]]:
        """One forward pass, ``done`` steps of the plan later, and what is drawn and pooled then."""
        rows = [
            (slot, start + done, count)
            for slot, start, count in zip(plan.slots, plan.starts, plan.counts, strict=True)
        ]
        # All rows write before any row reads, as in a forward pass.
        for slot, start, count in rows:
            self._write(slot, start, count)
        prefixes = [self._read(slot, start, start + count) for slot, start, count in rows]
        drawn = []
        pooled = {}
        for index, (row, slot) in enumerate(plan.samples):
            _, start, count = rows[row]
            if self.pooled[slot]:
                pooled[len(drawn)] = vector(prefixes[row])
                drawn.append(0)
                continue
            token = draw(prefixes[row], self.seeds[slot])
            self.tokens[slot] = [*self.tokens[slot][: start + count], token]
            self._scribble(slot, start + count)
            if self.candidates[slot]:
                count = self.candidates[slot]
                ids, logprobs = likeliest(prefixes[row])
                self.details[index] = SampleLogprobs(logprobs[0], 1, ids[:count], logprobs[:count])
                self.tokens[slot][-1] = None  # told by a later plan
            drawn.append(token)
        return drawn, pooled

    def _cell(self, slot: int, position: int) -> tuple[list[int | None], int]:
        index, offset = divmod(position, self.block_size)
        return self.cells[self.tables[slot][index]], offset

    def _scribble(self, slot: int, end: int) -> None:
        """What a speculative step would do to the slots reserved behind the last token."""
        for position in range(end, min(end + self.lookahead, len(self.tables[slot]) * self.block_size)):
            block, offset = self._cell(slot, position)
            block[offset] = None

    def _write(self, slot: int, start: int, count: int) -> None:
        tokens = self.tokens[slot]
        if start + count > len(tokens):
            raise AssertionError(f"slot {slot} is to compute tokens the worker does not have")
        running = 0
        for position, token in enumerate(tokens[: start + count]):
            running = prefix_hash(running, token)
            if position >= start:
                block, offset = self._cell(slot, position)
                block[offset] = running

    def _read(self, slot: int, start: int, end: int) -> int:
        running = 0
        for position, token in enumerate(self.tokens[slot][:end]):
            running = prefix_hash(running, token)
            if self.window is not None and position <= start - self.window:
                continue
            block, offset = self._cell(slot, position)
            if block[offset] != running:
                raise AssertionError(f"slot {slot} reads foreign data at position {position}")
        return running


def expected_vector(prompt: list[int]) -> np.ndarray:
    running = 0
    for token in prompt:
        running = prefix_hash(running, token)
    return vector(running)


def expected_output(prompt: list[int], rng_seed: int, max_tokens: int, stop: set[int | None]) -> list[int]:
    """What a sequence generates when nothing else exists."""
    running = 0
    for token in prompt:
        running = prefix_hash(running, token)
    output: list[int] = []
    while len(output) < max_tokens:
        token = draw(running, rng_seed)
        output.append(token)
        if token in stop:
            break
        running = prefix_hash(running, token)
    return output


def expected_beams(
    prompt: list[int],
    width: int,
    max_tokens: int,
    stop: set[int | None] | Callable[[list[int]], bool],
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
) -> list[tuple[list[int], float]]:
    """What beam search finds when nothing else exists: ``(tokens, total log-probability)``, best first.

    In the form of transformers' own, with an array of scores over all beams and tokens, and hypotheses that
    are kept beside the running beams. stop: tokens that end an output, or whether an output has ended.
    """
    ended_by = stop if callable(stop) else lambda tokens: tokens[-1] in stop
    start = 0
    for token in prompt:
        start = prefix_hash(start, token)
    running = [([], 0.0, start)]
    done: list[tuple[float, list[int], float]] = []
    ends = 1 if callable(stop) else len(stop - {None})
    for length in range(1, max_tokens + 1):
        grid = []
        for tokens, total, prefix in running:
            for token, logprob in zip(*likeliest(prefix), strict=True):
                grid.append((total + logprob, [*tokens, token], prefix_hash(prefix, token)))
        grid.sort(key=lambda entry: -entry[0])
        grid = grid[: max(2, 1 + ends) * width]
        hit = [ended_by(tokens) or length == max_tokens for _, tokens, _ in grid]
        done += [
            (total / length**length_penalty, tokens, total)
            for (total, tokens, _), ended in zip(grid[:width], hit, strict=False)
            if ended
        ]
        done = sorted(done, key=lambda entry: -entry[0])[:width]
        running = [
            (tokens, total, prefix)
            for (total, tokens, prefix), ended in zip(grid, hit, strict=True)
            if not ended
        ][:width]
        if not running:
            break
        if len(done) == width:
            reach = max_tokens if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or running[0][1] / reach**length_penalty <= done[-1][0]:
                break
    return [(tokens, total) for _, tokens, total in done]
