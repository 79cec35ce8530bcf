"""One device's share of the engine: load, allocate, and run plans."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from aserve import ops
from aserve.attention import route
from aserve.config.engine import EngineConfig
from aserve.messages.step import CacheCapacity, SampleLogprobs, StepPlan, StepResult
from aserve.model.loader import load_model
from aserve.ops.decoder import MAX_STEPS
from aserve.sampling.sampler import Sampled, SamplerState
from aserve.worker import kv_cache
from aserve.worker.batch_state import BatchState, ModelInputs
from aserve.worker.contained import ContainedRows

_LOGITS_BYTES = 64 << 20
"""Most memory that the logits of prompt positions may take at once."""


class Handle(Protocol):
    """A launched step. ``wait`` returns its result, at once if ``ready``."""

    ready: bool

    def wait(self) -> StepResult: ...


class _Done:
    """A step that was complete when its launch returned."""

    __slots__ = ("_result",)
    ready = True

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result


class Worker:
    """Runs plans one after the other; used from one thread only."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = torch.device(config.device.device)
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)

    @torch.inference_mode()
    def start(self) -> CacheCapacity:
        """Loads the model, allocates the cache, runs one warm-up step."""
        config = self.config
        route.check(self.device)
        phases: dict[str, float] = {}
        clock = _Stopwatch(phases)
        torch.manual_seed(config.model.seed)
        self.model = load_model(config.model, config.load, self.device)
        clock.lap("weights")
        block_size = config.cache.block_size
        shapes = self.model.kv_shapes
        block_bytes = kv_cache.bytes_per_block(shapes, block_size, self.dtype)
        num_blocks = kv_cache.count_blocks(config, block_bytes, self.device)
        self.caches = kv_cache.allocate(num_blocks, shapes, block_size, self.dtype, self.device)
        num_swap_blocks = kv_cache.count_swap_blocks(config, block_bytes)
        self.swap_space = kv_cache.allocate(
            num_swap_blocks,
            shapes,
            block_size,
            self.dtype,
            torch.device("cpu"),
            pinned=self.device.type == "cuda" and num_swap_blocks > 0,
        )
        num_slots = config.scheduler.max_num_seqs
        self.batch = BatchState(num_slots, config.model.max_model_len, block_size, self.device)
        self.sampler = SamplerState(num_slots, config.model.vocab_size, self.device)
        self.rows = ContainedRows(self.sampler)
        cache_gib = num_blocks * block_bytes / 2**30
        clock.lap("KV cache")
        self._warm_up()
        clock.lap("warm-up")
        return CacheCapacity(
            num_gpu_blocks=num_blocks,
            num_cpu_blocks=num_swap_blocks,
            num_slots=num_slots,
            max_steps=MAX_STEPS if self.model.greedy_stack is not None else 1,
            phases=phases,
            description={
                "device": str(self.device),
                "dtype": config.model.dtype,
                "KV cache": f"{num_blocks} blocks of {block_size} ({cache_gib:.2f} GiB)",
                "kernels": " ".join(f"{name}={kind}" for name, kind in sorted(ops.kernels().items())),
                "threads": str(torch.get_num_threads()),
            },
        )

    def launch(self, plan: StepPlan) -> Handle:
        """Runs a plan. On the CPU the returned step is complete."""
        started = time.perf_counter()
        result = self._run(plan)
        result.seconds = time.perf_counter() - started
        return _Done(result)

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> StepResult:
        self.batch.apply(plan)
        for new in plan.new:
            self.rows.add(new)
        for fork in plan.forks:
            self.rows.fork(fork)
        for slot, position, token_id in plan.chosen:
            self.rows.choose(slot, position, token_id)
        if plan.swap_outs:
            kv_cache.move_blocks(self.caches, self.swap_space, plan.swap_outs)
        if plan.swap_ins:
            kv_cache.move_blocks(self.swap_space, self.caches, plan.swap_ins)
        if plan.block_copies:
            ops.copy_blocks(self.caches, plan.block_copies)
        if self._is_greedy(plan):
            return self._greedy_steps(plan)
        inputs = self.batch.inputs(plan)
        hidden = self.model.forward(inputs.token_ids, inputs.positions, self.caches, inputs.attention)
        prompt_logprobs = None
        if self.batch.wants_prompt_logprobs:
            prompt_logprobs = self._prompt_logprobs(plan, inputs, hidden)
        if not plan.samples:
            return StepResult(plan.step_id, [], [], prompt_logprobs=prompt_logprobs)
        if self.batch.pools(plan):
            return self._pooling_step(plan, inputs, hidden, prompt_logprobs)
        sampled = self._sample(plan, inputs, hidden)
        return StepResult(
            step_id=plan.step_id,
            token_ids=sampled.token_ids.tolist(),
            logprobs=sampled.logprobs.tolist(),
            details=sampled.details or None,
            prompt_logprobs=prompt_logprobs,
            failed=sampled.failed or None,
        )

    def _is_greedy(self, plan: StepPlan) -> bool:
        """Whether every row computes one token and draws the likeliest next one, with nothing else asked but
        a guide, whose mask comes after the native operation.

        Such a step is one native operation: while its weights stream through the caches everything else
        is driven out of them, and each Python call after that costs several times what it does when warm.
        """
        return (
            self.model.greedy_stack is not None
            and plan.num_prefill_rows == 0
            and plan.samples == list(enumerate(plan.slots))
            and not self.batch.wants_prompt_logprobs
            and not self.batch.pools(plan)
            and self.sampler.only_likeliest(plan.slots)
        )

    def _greedy_steps(self, plan: StepPlan) -> StepResult:
        stack = self.model.greedy_stack
        if stack is None:
            raise RuntimeError("this model has no native greedy step")
        run, steps = stack.greedy(
            self.batch.tokens,
            self.batch.host_tables,
            plan.slots,
            plan.starts,
            self.caches,
            ends=self.sampler.ends[plan.slots] if plan.max_steps > 1 else None,
            steps=plan.max_steps,
            seconds=plan.seconds,
            number=plan.step_id,
        )
        token_ids, logprobs = run.token_ids[:steps].ravel().tolist(), run.logprobs[:steps].ravel().tolist()
        failed, redrawn = self.rows.take_likeliest(plan.slots, token_ids, logprobs, run.logits)
        if redrawn:
            self.batch.store_drawn(plan, torch.tensor(token_ids))
        return StepResult(plan.step_id, token_ids, logprobs, failed=failed or None, steps=steps)

    def interrupt(self, step_id: int) -> None:
        """Ends plans up to that one after the step they are at. May be called by any thread."""
        if self.model.greedy_stack is not None:
            self.model.greedy_stack.halt(step_id)

    def _sample(self, plan: StepPlan, inputs: ModelInputs, hidden: torch.Tensor) -> Sampled:
        rows = [row for row, _ in plan.samples]
        distinct = list(dict.fromkeys(rows))
        if distinct != list(range(hidden.shape[0])):
            hidden = hidden[torch.from_numpy(inputs.last_tokens[distinct]).to(self.device)]
        if len(distinct) < len(rows):
            place = {row: index for index, row in enumerate(distinct)}
            rows = [place[row] for row in rows]
        else:
            rows = list(range(len(rows)))
        slots = [slot for _, slot in plan.samples]
        sampled = self.rows.sample(lambda: self.model.compute_logits(hidden), rows, slots)
        self.batch.store_drawn(plan, sampled.token_ids)
        return sampled

    def _pooling_step(
        self,
        plan: StepPlan,
        inputs: ModelInputs,
        hidden: torch.Tensor,
        prompt_logprobs: dict[int, list[SampleLogprobs]] | None,
    ) -> StepResult:
        """The result of a step with vectors among its samples; the other samples draw as ever."""
        count = len(plan.samples)
        result = StepResult(plan.step_id, [0] * count, [0.0] * count, prompt_logprobs=prompt_logprobs)
        pooled = [i for i, (_, slot) in enumerate(plan.samples) if slot in self.batch.pooled]
        drawn = [i for i, (_, slot) in enumerate(plan.samples) if slot not in self.batch.pooled]
        failed: dict[int, str] = {}
        if pooled:
            last = inputs.last_tokens[[plan.samples[i][0] for i in pooled]]
            vectors = hidden[torch.from_numpy(last).to(self.device)].float().cpu().numpy()
            result.pooled = {}
            for i, vector in zip(pooled, vectors, strict=True):
                if np.isfinite(vector).all():
                    result.pooled[i] = vector
                else:
                    failed[i] = "the hidden state is not finite"
        if drawn:
            sampled = self._sample(replace(plan, samples=[plan.samples[i] for i in drawn]), inputs, hidden)
            tokens, logprobs = sampled.token_ids.tolist(), sampled.logprobs.tolist()
            for i, token, logprob in zip(drawn, tokens, logprobs, strict=True):
                result.token_ids[i], result.logprobs[i] = token, logprob
            result.details = {drawn[i]: details for i, details in sampled.details.items()} or None
            failed.update((drawn[i], reason) for i, reason in sampled.failed.items())
        result.failed = failed or None
        return result

    def _prompt_logprobs(
        self, plan: StepPlan, inputs: ModelInputs, hidden: torch.Tensor
    ) -> dict[int, list[SampleLogprobs]] | None:
        piece = max(1, _LOGITS_BYTES // (4 * self.config.model.vocab_size))
        results: dict[int, list[SampleLogprobs]] = {}
        for row in range(len(plan.slots)):
            span = self.batch.prompt_span(plan, row)
            if span is None:
                continue
            count, targets = span
            first = inputs.attention.query_start_host[row]
            entries: list[SampleLogprobs] = []
            for at in range(0, count, piece):
                end = min(at + piece, count)
                # Without a name: the next piece is computed when these logits are gone.
                entries += self.rows.prompt_logprobs(
                    self.model.compute_logits(hidden[first + at : first + end]),
                    targets[at:end],
                    plan.slots[row],
                )
            results[row] = entries
        return results or None

    def _warm_up(self) -> None:
        """One prompt step and one decode step, so that the first request finds everything loaded.

        Uses block 0 and leaves its contents: whoever gets the block writes before reading.
        """
        length = min(16, self.config.cache.block_size, self.config.model.max_model_len)
        for start, count in ((0, length - 1), (length - 1, 1)):
            if count > 0:
                plan = StepPlan(-1, [0], [start], [count], [])
                inputs = self.batch.inputs(plan)
                hidden = self.model.forward(inputs.token_ids, inputs.positions, self.caches, inputs.attention)
                self.model.compute_logits(hidden[-1:])


class _Stopwatch:
    def __init__(self, laps: dict[str, float]) -> None:
        self._laps = laps
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now
