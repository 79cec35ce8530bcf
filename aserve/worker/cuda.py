"""Running plans on an NVIDIA GPU."""

from __future__ import annotations

import logging
from functools import partial

import torch

from aserve.config.engine import EngineConfig
from aserve.messages.params import SamplingParams
from aserve.messages.step import CacheCapacity, StepPlan
from aserve.ops import cuda, hardware
from aserve.worker import capacity, graphs, kv_cache
from aserve.worker.accelerator import Accelerator, CudaAccelerator
from aserve.worker.device_batch import DeviceBatch
from aserve.worker.runner import Handle, Runner
from aserve.worker.samples import Samples
from aserve.worker.staging import PinnedPool, Staging
from aserve.worker.swap import BlockMover

logger = logging.getLogger(__name__)

_STAGING_BYTES = 1 << 20
_RESULT_BYTES = 64 << 10


class CudaWorker(Runner):
    """Queues plans one behind the other; whoever waits for a step is another thread.

    A launch never waits for the device: a step's input tokens are where the step before leaves them on the
    device. The exceptions are steps whose rows need the host before they can be drawn (see
    :mod:`aserve.worker.samples`).
    """

    batch: DeviceBatch

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.accelerator: Accelerator = CudaAccelerator()
        self.device = self.accelerator.device

    def start(self) -> CacheCapacity:
        with self.accelerator.active():
            return super().start()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Handle:
        with self.accelerator.active():
            return self._launch(plan)

    def _launch(self, plan: StepPlan) -> Handle:
        started = self.accelerator.event(timing=True)
        started.record(self.accelerator.compute)
        self.rows.begin(plan)
        batch, upload = self.batch, self.staging.begin()
        batch.note(plan)
        size = self._graph_size(plan)
        parts = batch.pack(plan, upload, size)
        samples = Samples(plan, upload, self.rows, batch, captured=size is not None)
        outs = upload.add_ids([block for block, _ in plan.swap_outs])
        ins = upload.add_ids([block for _, block in plan.swap_ins])
        copies = self.mover.pack(plan.block_copies, upload)
        upload.send(0 if size is None else self.graphs.row_bytes(size))
        batch.apply(plan, parts, upload)
        if plan.swap_outs:
            self.mover.move_out(plan.swap_outs, upload[outs])
        if plan.swap_ins:
            self.mover.move_in(plan.swap_ins, upload[ins])
        self.mover.copy(plan.block_copies, upload, copies)
        prompt_logprobs = None
        if size is not None:
            decoded = self.graphs.replay(size)
            samples.draw(decoded.logits, (decoded.token_ids, decoded.logprobs))
        else:
            inputs = batch.inputs(plan, parts, upload)
            hidden = self.model.forward(inputs.token_ids, inputs.positions, self.caches, inputs.attention)
            if batch.lists_prompts(plan):
                prompt_logprobs = self._prompt_logprobs(plan, inputs, hidden)
            samples.pool(hidden)
            if samples.num_drawn:
                samples.draw(self.model.compute_logits(samples.pick(hidden)))
        if samples.num_drawn:
            batch.store_drawn(parts, upload, samples.token_ids)
        return samples.finish(self.accelerator, self.results, started, prompt_logprobs)

    def _graph_size(self, plan: StepPlan) -> int | None:
        """The captured batch that the step is to be, if it can be one."""
        if plan.num_prefill_rows or self.batch.pools(plan) or self.batch.lists_prompts(plan):
            return None
        return self.graphs.fitting(len(plan.slots), max(plan.starts) + 1)

    # ---------------------------------------------------------------- start

    def _allocate(self, block_bytes: int) -> tuple[int, int]:
        config, accelerator, shapes = self.config, self.accelerator, self.model.kv_shapes
        block_size, model = config.cache.block_size, config.model
        self.staging = Staging(accelerator, _STAGING_BYTES)
        self.results = PinnedPool(accelerator, _RESULT_BYTES)
        self.batch = DeviceBatch(config.scheduler.max_num_seqs, model.max_model_len, block_size, self.device)
        self.graphs = graphs.DecodeGraphs(
            accelerator,
            self.batch,
            self.staging,
            lambda ids, positions, meta: self.model.forward(ids, positions, self.caches, meta),
            self.model.compute_logits,
            model.max_seq_len_to_capture,
        )
        # All tables name block 0: of the largest step's memory, the cache is counted by itself.
        self.caches = kv_cache.allocate(1, shapes, block_size, self.dtype, self.device)
        self.mover = BlockMover(accelerator, self.caches, 0)
        sizes = self._captured_sizes()
        self.memory = capacity.profile(
            accelerator,
            [partial(self._try, plan) for plan in self._largest_plans()],
            partial(self.graphs.run_idle, max(sizes)) if sizes else None,
        )
        num_swap_blocks = kv_cache.count_swap_blocks(config, block_bytes)
        extra = block_bytes + BlockMover.staging_bytes(block_bytes, num_swap_blocks)
        num_blocks = capacity.count_device_blocks(config, block_bytes, extra, self.memory)
        # The last block belongs to nobody; rows that only fill a captured batch write there.
        self.caches = kv_cache.allocate(num_blocks + 1, shapes, block_size, self.dtype, self.device)
        self.batch.set_scratch(num_blocks)
        self.mover = BlockMover(accelerator, self.caches, num_swap_blocks)
        return num_blocks, num_swap_blocks

    def _warm_up(self) -> None:
        # Whatever the largest steps left in the slots goes with whoever gets them.
        self.graphs.capture(self._captured_sizes())
        self.accelerator.synchronize()

    def _captured_sizes(self) -> list[int]:
        if self.config.model.enforce_eager:
            return []
        sizes = graphs.batch_sizes(self.config.scheduler.max_num_seqs)
        if graphs.gathers(self.model.kv_shapes, self.dtype, self.device):
            widest = max(heads * size for heads, size in self.model.kv_shapes)
            fine = graphs.gathered_sizes(sizes, 2 * widest * self.dtype.itemsize * self.graphs.longest)
            if fine != sizes:
                logger.info(
                    "steps of up to %d sequences are captured, larger ones are not: torch's attention would "
                    "gather sequences of max_seq_len_to_capture (%d) tokens for each",
                    max(fine, default=0),
                    self.graphs.longest,
                )
            sizes = fine
        return sizes

    def _largest_plans(self) -> list[StepPlan]:
        """As many prompts as there may be, in one step; and the end of the longest prompt."""
        scheduler, most = self.config.scheduler, self.config.model.max_model_len
        rows, budget = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        counts = [min(most, budget // rows + (row < budget % rows)) for row in range(rows)]
        prefills = sum(count > 1 for count in counts)
        samples = [(row, row) for row in range(rows)]
        slots = list(range(rows))
        plans = [StepPlan(-1, slots, [0] * rows, counts, samples, num_prefill_rows=prefills)]
        count = min(most, budget)
        plans.append(StepPlan(-1, [0], [most - count], [count], [(0, 0)], num_prefill_rows=int(count > 1)))
        return plans

    def _try(self, plan: StepPlan) -> None:
        """Runs a plan with the sampling that takes most memory."""
        params = SamplingParams(temperature=1.0, top_p=0.9, top_k=100, logprobs=0, presence_penalty=0.1)
        for slot in plan.slots:
            self.sampler.add(slot, params, 0, [], [], None)
        self._launch(plan).wait()

    def _facts(self) -> dict[str, str]:
        index, dtype = self.device.index or 0, self.dtype
        served = {
            each.op
            for each in hardware.combinations()
            if any(cuda.serves(each.op, dtype, cached, index) for cached in (dtype, None))
        }
        sizes = self.graphs.sizes
        return {
            "memory": str(self.memory),
            "kernels": " ".join(sorted(served)) or "torch's",
            "graphs": f"{len(sizes)} up to {max(sizes)} sequences of {self.graphs.longest} tokens"
            if sizes
            else "none",
        }
