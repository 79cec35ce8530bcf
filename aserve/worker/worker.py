"""Running plans on the CPU, and the choice of what runs them."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from aserve import ops
from aserve.config.engine import EngineConfig
from aserve.messages.step import SampleLogprobs, StepPlan, StepResult
from aserve.sampling.sampler import Sampled
from aserve.worker import kv_cache
from aserve.worker.batch_state import BatchState, ModelInputs
from aserve.worker.runner import Handle, Runner


def make_runner(config: EngineConfig) -> Runner:
    """What runs plans on the device of that configuration."""
    if config.device.device == "cuda":
        from aserve.worker.cuda import CudaWorker

        return CudaWorker(config)
    return Worker(config)


_KEPT_LOGITS_BYTES = 64 << 20


class _Done:
    """A step that was complete when its launch returned."""

    __slots__ = ("_result",)
    ready = True

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result


class Worker(Runner):
    """Runs plans on the CPU, each to its end before the launch returns."""

    batch: BatchState

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._logits = torch.empty(0)

    def _facts(self) -> dict[str, str]:
        kernels = " ".join(f"{name}={kind}" for name, kind in sorted(ops.kernels().items()))
        return {"kernels": kernels, "threads": str(torch.get_num_threads())}

    def _allocate(self, block_bytes: int) -> tuple[int, int]:
        config, shapes = self.config, self.model.kv_shapes
        block_size = config.cache.block_size
        num_blocks = kv_cache.count_blocks(config, block_bytes)
        self.caches = kv_cache.allocate(num_blocks, shapes, block_size, self.dtype, self.device)
        num_swap_blocks = kv_cache.count_swap_blocks(config, block_bytes)
        self.swap_space = kv_cache.allocate(num_swap_blocks, shapes, block_size, self.dtype, self.device)
        self.batch = BatchState(
            config.scheduler.max_num_seqs, config.model.max_model_len, block_size, self.device
        )
        return num_blocks, num_swap_blocks

    def launch(self, plan: StepPlan) -> Handle:
        """Runs a plan; the returned step is complete."""
        started = time.perf_counter()
        result = self._run(plan)
        result.seconds = time.perf_counter() - started
        return _Done(result)

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> StepResult:
        self.batch.apply(plan)
        self.rows.begin(plan)
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
        sampled = self.rows.sample(lambda: self._compute_logits(hidden), rows, slots)
        self.batch.store_drawn(plan, sampled.token_ids)
        return sampled

    def _compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Written over those of the step before: fresh memory costs more than the product."""
        rows = hidden.shape[0]
        out = self._logits[:rows] if rows <= self._logits.shape[0] else None
        logits = self.model.compute_logits(hidden, out)
        if out is None and logits.nbytes <= _KEPT_LOGITS_BYTES:
            self._logits = logits
        return logits

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
