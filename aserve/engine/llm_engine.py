"""LLMEngine: scheduler, executor, and what stands before and behind them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, NoReturn

from aserve import registry
from aserve.args import EngineArgs
from aserve.config.cache import CacheConfig
from aserve.config.decoding import DecodingConfig
from aserve.config.device import DeviceConfig
from aserve.config.engine import EngineConfig
from aserve.config.load import LoadConfig
from aserve.config.lora import LoRAConfig
from aserve.config.model import ModelConfig
from aserve.config.parallel import ParallelConfig
from aserve.config.scheduler import SchedulerConfig
from aserve.config.speculative import SpeculativeConfig
from aserve.config.vision import VisionLanguageConfig
from aserve.core.scheduler import Scheduler, SchedulerLimits
from aserve.core.sequence import SequenceGroup
from aserve.engine.input import InputProcessor
from aserve.engine.output import OutputProcessor, Sink
from aserve.engine.pace import Pace
from aserve.engine.stats import EngineStats
from aserve.engine.stream import Mailbox
from aserve.errors import AserveError, ConfigError, QueueFullError, RequestTimeoutError
from aserve.executor.base import ExecutorBase
from aserve.messages.inputs import (
    LoRARequest,
    MultiModalData,
    OutputKind,
    PoolingParams,
    PromptInputs,
    RequestOptions,
    UsageContext,
)
from aserve.messages.outputs import EmbeddingRequestOutput, RequestOutput
from aserve.messages.params import SamplingParams
from aserve.messages.step import StepPlan, StepResult
from aserve.tokenizer.loader import load_generation_eos, load_tokenizer

logger = logging.getLogger(__name__)

_RUN_SECONDS = 0.016
"""Most time for the steps of one plan. Their tokens come at once; a display shows nothing more often."""

_UNWATCHED_SECONDS = 0.1
"""The same where nobody sees a token before the last one."""

_LONGEST_RETRY = 60.0
"""Most seconds a refused client is told to wait."""


class LLMEngine:
    """Receives requests and generates text, one ``step`` at a time.

    Constructing it loads the model: it is then ready. ``LLM`` and ``AsyncLLMEngine`` are built on it;
    used directly, ``add_request`` and ``step`` belong to one thread.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        cache_config: CacheConfig,
        parallel_config: ParallelConfig,
        scheduler_config: SchedulerConfig,
        device_config: DeviceConfig,
        load_config: LoadConfig,
        lora_config: LoRAConfig | None,
        vision_language_config: VisionLanguageConfig | None,
        speculative_config: SpeculativeConfig | None,
        decoding_config: DecodingConfig | None,
        executor_class: type[ExecutorBase],
        log_stats: bool,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
    ) -> None:
        started = time.perf_counter()
        self.config = config = EngineConfig(
            model=model_config,
            cache=cache_config,
            parallel=parallel_config,
            scheduler=scheduler_config,
            device=device_config,
            load=load_config,
            lora=lora_config,
            vision_language=vision_language_config,
            speculative=speculative_config,
            decoding=decoding_config or DecodingConfig(),
            tokenizer_pool=None,
        )
        self.model_config = model_config
        self.usage_context = usage_context
        self.executor = executor_class(config)
        try:
            capacity = self.executor.start()
            before = time.perf_counter()
            tokenizer = None
            if not model_config.skip_tokenizer_init:
                tokenizer = load_tokenizer(
                    model_config.tokenizer,
                    mode=model_config.tokenizer_mode,
                    trust_remote_code=model_config.trust_remote_code,
                    revision=model_config.tokenizer_revision,
                )
            tokenizer_seconds = time.perf_counter() - before
            self.capacity = capacity.result()
        except BaseException:
            self.executor.close()
            raise
        self.stats = EngineStats(
            config,
            enabled=log_stats,
            num_gpu_blocks=self.capacity.num_gpu_blocks,
            num_cpu_blocks=self.capacity.num_cpu_blocks,
        )
        self.input = InputProcessor(config, tokenizer, load_generation_eos(model_config.model))
        self.core = Scheduler(
            SchedulerLimits(
                num_blocks=self.capacity.num_gpu_blocks,
                block_size=cache_config.block_size,
                max_num_batched_tokens=scheduler_config.max_num_batched_tokens,
                max_num_seqs=self.capacity.num_slots,
                chunked_prefill=scheduler_config.enable_chunked_prefill,
                delay_factor=scheduler_config.delay_factor,
                prefix_caching=cache_config.enable_prefix_caching,
                window=model_config.uniform_window,
                num_swap_blocks=self.capacity.num_cpu_blocks,
                preemption_mode=scheduler_config.preemption_mode,
                num_lookahead_slots=scheduler_config.num_lookahead_slots,
                max_waiting_requests=scheduler_config.max_waiting_requests,
                max_waiting_tokens=scheduler_config.max_waiting_tokens,
            )
        )
        self._max_steps = self._most_steps(scheduler_config.num_scheduler_steps)
        self._pace = Pace(scheduler_config.max_decode_slowdown)
        self.output = OutputProcessor(self.core, tokenizer, self.stats)
        self._ready_outputs: list[RequestOutput | EmbeddingRequestOutput] = []
        self._preemptions_told = 0
        # Not a bound method: the statistics must not keep the engine, and its device memory, alive.
        stats, core = self.stats, self.core

        def refresh() -> None:
            stats.set_load(**_load_of(core))
            stats.set_ledger(asdict(core.ledger))

        stats.refresh = refresh
        self.phases = {**self.capacity.phases, "tokenizer": tokenizer_seconds}
        self.phases["total"] = time.perf_counter() - started
        self._log_start()

    @classmethod
    def from_engine_args(
        cls, engine_args: EngineArgs, usage_context: UsageContext = UsageContext.ENGINE_CONTEXT
    ) -> LLMEngine:
        """Checks the arguments, then loads the model. Raises ConfigError before weights are read."""
        config = engine_args.create_engine_config()
        return cls.from_config(config, not engine_args.disable_log_stats, usage_context)

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        log_stats: bool,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        executor_class: type[ExecutorBase] | None = None,
    ) -> LLMEngine:
        """The same for a configuration that has been checked already; it names the executor if you do not."""
        return cls(
            config.model,
            config.cache,
            config.parallel,
            config.scheduler,
            config.device,
            config.load,
            config.lora,
            config.vision_language,
            config.speculative,
            config.decoding,
            executor_class=executor_class or registry.executors.load(config.parallel.executor),
            log_stats=log_stats,
            usage_context=usage_context,
        )

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("an LLMEngine cannot be pickled: it owns a device and its threads")

    # ---------------------------------------------------------------- requests

    def add_request(
        self,
        request_id: str,
        inputs: PromptInputs | None,
        params: SamplingParams | PoolingParams,
        prompt_token_ids: list[int] | None = None,
        arrival_time: float | None = None,
        lora_request: LoRARequest | None = None,
        multi_modal_data: MultiModalData | None = None,
        options: RequestOptions | None = None,
    ) -> None:
        """Queues a request; its outputs come from ``step``.

        Raises InvalidRequestError (a ValueError) for bad input, KeyError for an id already in use and
        QueueFullError when too many requests wait.
        A prompt longer than the model allows is no error: it ends at once with finish_reason "length".
        """
        checked = self.input.check_params(params)
        self.check_room()
        text, ids = self.input.split(inputs, prompt_token_ids)
        if ids is None:
            ids = self.input.encode(text or "")
        guided = checked.guided if isinstance(checked, SamplingParams) else None
        group = self.input.make_group(
            request_id,
            text,
            ids,
            checked,
            time.time() if arrival_time is None else arrival_time,
            lora_request,
            multi_modal_data,
            options,
            None if guided is None else self.input.guides.compile(guided),
        )
        self.queue(group, OutputKind.CUMULATIVE, self._ready_outputs.append)

    def check_room(self, num_coming: int = 0) -> None:
        """Raises QueueFullError if too many requests wait already, before any work is done on another.

        num_coming: requests that were let in and are not queued yet.
        """
        try:
            self.core.check_room(num_coming=num_coming)
        except QueueFullError as error:
            self._count_refusal(error)
            raise

    def _count_refusal(self, error: QueueFullError) -> None:
        self.stats.on_rejected("queue_full")
        head = self.core.waiting.head
        if head is not None:
            # How long the first in the queue has waited is about how long a newcomer would.
            error.retry_after = min(max(1.0, time.time() - head.arrival_time), _LONGEST_RETRY)

    def queue(
        self, group: SequenceGroup, kind: OutputKind, sink: Sink, mailbox: Mailbox | None = None
    ) -> None:
        """Hands a request to the scheduler; ``sink`` is called with each of its outputs."""
        try:
            accepted = self.core.add(group)
        except QueueFullError as error:
            self._count_refusal(error)
            raise
        self._interrupt()
        try:
            self.output.add(group, kind, sink, mailbox)
        except BaseException:
            self.core.abort(group.request_id)  # or it would run with nobody to tell
            raise
        if not accepted:
            self.output.end_without_tokens(group.seqs[0])

    def abort_request(self, request_id: str | Iterable[str], cause: str = "caller") -> None:
        """Ends requests at once and frees what they held; unknown ids are ignored."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        for each in ids:
            self.output.drop(each)
            group = self.core.abort(each)
            if group is not None:
                self._interrupt()
                self.stats.on_aborted(cause)
                self.output.log_end(f"aborted: {cause}", group)

    def fail_request(self, request_id: str, error: AserveError, cause: str) -> None:
        """Ends a request by an error that its caller sees."""
        self.output.fail(request_id, error)
        group = self.core.abort(request_id)
        if group is not None:
            self.stats.on_aborted(cause)
            self.output.log_end(f"aborted: {cause}", group)

    def has_unfinished_requests(self) -> bool:
        return self.core.num_unfinished > 0

    def get_num_unfinished_requests(self) -> int:
        return self.core.num_unfinished

    # ---------------------------------------------------------------- steps

    def schedule(self) -> StepPlan | None:
        """Decides the next step, and tells callers about requests that ended without one."""
        allowed = self._pace.prompt_tokens(len(self.core.waiting) - self.core.num_swapped)
        plan = self.core.schedule(time.time(), *self._steps_at_once(), allowed)
        if plan is not None:
            self._pace.issued(plan)
        for group in self.core.take_expired():
            self._expire(group)
        for seq in self.core.take_capped():
            self.output.end_without_tokens(seq)
        return plan

    def _most_steps(self, asked: int | None) -> int:
        most = self.capacity.max_steps
        if asked is not None and asked > most:
            raise ConfigError(
                f"num_scheduler_steps must be at most {most} with this model and device, got {asked}; "
                "leave it out for what suits them",
                param="num_scheduler_steps",
            )
        return most if asked is None else asked

    def _steps_at_once(self) -> tuple[int, float]:
        """Steps that one plan may hold, and their time: as many as fit it, going by the last ones.

        While one such plan is computed nothing else is decided. Less would be gained by doing so where
        a step takes long.
        """
        if self._max_steps == 1:
            return 1, math.inf
        watched = any(not state.whole for state in self.output.states.values())
        most = _RUN_SECONDS if watched else _UNWATCHED_SECONDS
        step = self._pace.step_seconds
        if not step:
            return self._max_steps, most
        return max(1, min(self._max_steps, int(most / step))), most

    def _interrupt(self) -> None:
        """Has several steps in flight end early: there is something else to decide."""
        if self.core.run_in_flight is not None:
            self.executor.interrupt(self.core.run_in_flight)

    def _expire(self, group: SequenceGroup) -> None:
        """Tells the caller of a request, and the books, that its time was up."""
        error = RequestTimeoutError("the request was not completed within its timeout", param="timeout")
        state = self.output.states.get(group.request_id)
        if state is not None and state.mailbox is None:
            self.output.end_without_tokens(group.seqs[0])  # nobody to raise it at: finish_reason says it
        self.output.fail(group.request_id, error)
        self.stats.on_aborted("timeout")
        self.output.log_end("aborted: timeout", group)

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Applies a finished step and hands its outputs out."""
        now = time.time()
        self._pace.took(plan, result)
        changes = self.core.commit(plan, result, now)
        self.output.process(changes, now)
        core = self.core
        preemptions = core.num_preemptions - self._preemptions_told
        self._preemptions_told = core.num_preemptions
        self.stats.on_step(
            now=now,
            **_load_of(core),
            prompt_tokens=changes.prompt_tokens,
            generation_tokens=changes.num_tokens,
            preemptions=preemptions,
            prefix_queries=core.prefix_counts.queries,
            prefix_hits=core.prefix_counts.hits,
        )

    def step(self) -> list[RequestOutput | EmbeddingRequestOutput]:
        """Runs one iteration and returns the outputs it produced, cumulative; [] if there is no work.

        A request with PoolingParams has one EmbeddingRequestOutput.
        """
        plan = self.schedule()
        if plan is not None:
            self.commit(plan, self.executor.submit(plan).result())
        outputs = list(self._ready_outputs)
        self._ready_outputs.clear()
        return outputs

    # ---------------------------------------------------------------- the rest

    def get_tokenizer(self) -> Any:
        return self.input.tokenizer

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Replaces the tokenizer for requests added from now on."""
        self.input.guides.close()
        self.input = InputProcessor(self.config, tokenizer, load_generation_eos(self.config.model.model))
        self.output.set_tokenizer(tokenizer)

    def get_model_config(self) -> ModelConfig:
        return self.config.model

    def get_decoding_config(self) -> DecodingConfig:
        return self.config.decoding

    def check_health(self) -> None:
        """Raises EngineDeadError if no plan can be run any more."""
        self.executor.check_health()

    def do_log_stats(self) -> None:
        self.stats.maybe_log(time.time(), force=True)

    def close(self) -> None:
        """Ends the executor, and every thread and process of the engine. Idempotent."""
        self.input.guides.close()
        self.executor.close()

    def __del__(self) -> None:
        for owner, name in ((self, "executor"), (getattr(self, "input", None), "guides")):
            part = getattr(owner, name, None)
            if part is not None:
                part.close()

    def _log_start(self) -> None:
        facts = dict(self.capacity.description)
        logger.info(
            "ready: model %s (%s), %s; max_model_len %d, max_num_seqs %d, usage %s",
            ", ".join(self.config.model.served_model_name),
            self.config.model.architecture,
            ", ".join(f"{name} {value}" for name, value in facts.items()),
            self.config.model.max_model_len,
            self.config.scheduler.max_num_seqs,
            self.usage_context.value,
        )
        logger.info(
            "start-up seconds: %s", ", ".join(f"{name} {value:.2f}" for name, value in self.phases.items())
        )


def _load_of(core: Scheduler) -> dict[str, Any]:
    return {
        "running": len(core.running),
        "waiting": len(core.waiting) - core.num_swapped,
        "swapped": core.num_swapped,
        "gpu_cache_usage": core.blocks.pool.usage,
        "cpu_cache_usage": core.blocks.swap_pool.usage,
    }
