"""What an engine counts about itself: the Prometheus series and the line in the log.

Series that dashboards for this kind of server already know carry the prefix ``vllm:``; those that are
aserve's own carry ``aserve:``. All calls belong to the thread of the engine's loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from aserve.metrics import Metrics, one_two_five

if TYPE_CHECKING:
    from aserve.config.engine import EngineConfig

logger = logging.getLogger(__name__)

LOG_INTERVAL = 5.0
"""Seconds between two lines of statistics while steps are made."""

TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
TPOT_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
E2E_BOUNDS = (1, 2.5, 5, 10, 15, 20, 30, 40, 50, 60)
SEQUENCE_BOUNDS = (1, 2, 5, 10, 20)
LAG_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class EngineStats:
    """Counts steps and requests; renders them as metrics and as a log line.

    enabled: False (``--disable-log-stats``) makes every call do nothing and ``render`` empty.
    num_gpu_blocks, num_cpu_blocks: capacity, if already known; ``set_capacity`` tells it later.

    An engine that makes no step reports no load, so one whose last request was aborted sets
    ``refresh`` to a function that calls ``set_load``: it runs before each rendering.
    """

    def __init__(
        self, config: EngineConfig, *, enabled: bool, num_gpu_blocks: int = 0, num_cpu_blocks: int = 0
    ) -> None:
        self.enabled = enabled
        self.refresh: Callable[[], None] | None = None
        self._config = config
        metrics = Metrics({"model_name": config.model.served_model_name[0]})
        self._metrics = metrics
        self.set_capacity(num_gpu_blocks, num_cpu_blocks)

        self._running = metrics.gauge("vllm:num_requests_running", "Requests being computed.")
        self._waiting = metrics.gauge("vllm:num_requests_waiting", "Requests not started yet.")
        self._swapped = metrics.gauge("vllm:num_requests_swapped", "Requests whose cache is in CPU memory.")
        self._gpu_cache = metrics.gauge("vllm:gpu_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self._cpu_cache = metrics.gauge("vllm:cpu_cache_usage_perc", "Share of swap blocks in use, 0 to 1.")
        self._preemptions = metrics.counter(
            "vllm:num_preemptions_total", "Sequences put back for want of KV blocks."
        )
        self._prompt_tokens = metrics.counter("vllm:prompt_tokens_total", "Prompt tokens processed.")
        self._generation_tokens = metrics.counter("vllm:generation_tokens_total", "Tokens generated.")
        self._prefix_queries = metrics.counter(
            "vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = metrics.counter(
            "vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache."
        )
        self._ttft = metrics.histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", TTFT_BOUNDS
        )
        self._tpot = metrics.histogram(
            "vllm:time_per_output_token_seconds", "From one token of a request to its next.", TPOT_BOUNDS
        )
        self._e2e = metrics.histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end of the request.", E2E_BOUNDS
        )
        token_bounds = one_two_five(config.model.max_model_len)
        self._request_prompt = metrics.histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of finished requests.", token_bounds
        )
        self._request_generation = metrics.histogram(
            "vllm:request_generation_tokens", "Generated tokens of finished sequences.", token_bounds
        )
        self._best_of = metrics.histogram(
            "vllm:request_params_best_of", "best_of of finished requests.", SEQUENCE_BOUNDS
        )
        self._n = metrics.histogram("vllm:request_params_n", "n of finished requests.", SEQUENCE_BOUNDS)
        self._success = metrics.labelled(
            "vllm:request_success_total",
            "Finished sequences by reason; an aborted request counts once.",
            "finished_reason",
            ("stop", "length", "abort"),
        )
        self._prompt_rate = metrics.gauge(
            "vllm:avg_prompt_throughput_toks_per_s", "Prompt tokens per second since the last log line."
        )
        self._generation_rate = metrics.gauge(
            "vllm:avg_generation_throughput_toks_per_s", "Generated tokens per second, likewise."
        )

        self._aborted = metrics.labelled("aserve:requests_aborted_total", "Aborted requests.", "cause")
        self._rejected = metrics.labelled(
            "aserve:requests_rejected_total", "Requests never admitted.", "cause"
        )
        self._failed = metrics.labelled(
            "aserve:requests_failed_total", "Requests ended by an error.", "cause"
        )
        self._http_errors = metrics.labelled(
            "aserve:http_errors_total",
            "Requests for anything but health answered with a status of 400 or more, admitted or not.",
            "status",
        )
        self._lag = metrics.histogram(
            "aserve:event_loop_lag_seconds", "How late the event loop runs a timer that is due.", LAG_BOUNDS
        )
        self._tasks = metrics.gauge("aserve:event_loop_tasks", "Unfinished tasks of the event loop.")
        self._queue_time = metrics.histogram(
            "vllm:request_queue_time_seconds",
            "From arrival to the first step, of finished requests.",
            TTFT_BOUNDS,
        )
        self._ledger = metrics.labelled(
            "aserve:requests_total",
            "What became of every request; received is the sum of the others and of those unfinished.",
            "state",
            ("received", "finished", "aborted", "rejected", "failed"),
        )
        self._logged_at: float | None = None
        self._logged_prompt = 0
        self._logged_generation = 0

    def set_capacity(self, num_gpu_blocks: int, num_cpu_blocks: int) -> None:
        """Tell how many blocks the started executor holds."""
        cache = self._config.cache
        self._metrics.info(
            "vllm:cache_config_info",
            "Settings of the KV cache.",
            {
                "block_size": cache.block_size,
                "gpu_memory_utilization": cache.gpu_memory_utilization,
                "swap_space_bytes": cache.swap_space_bytes,
                "num_gpu_blocks_override": cache.num_gpu_blocks_override,
                "cache_dtype": cache.cache_dtype,
                "sliding_window": self._config.model.sliding_window,
                "enable_prefix_caching": cache.enable_prefix_caching,
                "num_gpu_blocks": num_gpu_blocks,
                "num_cpu_blocks": num_cpu_blocks,
            },
        )

    def set_load(
        self, *, running: int, waiting: int, swapped: int, gpu_cache_usage: float, cpu_cache_usage: float
    ) -> None:
        """Queue lengths in requests, and the share (0 to 1) of blocks in use."""
        self._running.value = running
        self._waiting.value = waiting
        self._swapped.value = swapped
        self._gpu_cache.value = gpu_cache_usage
        self._cpu_cache.value = cpu_cache_usage

    def set_tasks(self, count: int) -> None:
        self._tasks.value = count

    def set_ledger(self, counts: Mapping[str, int]) -> None:
        """Requests received so far, and what became of them."""
        for state, count in counts.items():
            self._ledger.children[state].value = count

    def on_scheduled(self, seconds: float) -> None:
        """A request waited ``seconds`` for its first step."""
        if self.enabled:
            self._queue_time.observe(seconds)

    def on_step(
        self,
        *,
        now: float,
        running: int,
        waiting: int,
        swapped: int,
        gpu_cache_usage: float,
        cpu_cache_usage: float,
        prompt_tokens: int,
        generation_tokens: int,
        preemptions: int,
        prefix_queries: int = 0,
        prefix_hits: int = 0,
    ) -> None:
        """After a step: the load it left, and what it alone computed and preempted.

        prefix_queries, prefix_hits: prompt tokens looked up and found since the engine started.
        """
        if not self.enabled:
            return
        self.set_load(
            running=running,
            waiting=waiting,
            swapped=swapped,
            gpu_cache_usage=gpu_cache_usage,
            cpu_cache_usage=cpu_cache_usage,
        )
        self._prompt_tokens.value += prompt_tokens
        self._generation_tokens.value += generation_tokens
        self._preemptions.value += preemptions
        self._prefix_queries.value = prefix_queries
        self._prefix_hits.value = prefix_hits
        self.maybe_log(now)

    def on_first_token(self, seconds: float) -> None:
        """A request's prompt is done, ``seconds`` after it arrived."""
        if self.enabled:
            self._ttft.observe(seconds)

    def on_output_token(self, seconds: float, requests: int = 1) -> None:
        """That many requests got a token ``seconds`` after the one before; once per request and step."""
        if self.enabled:
            self._tpot.observe(seconds, requests)

    def on_finished(
        self,
        *,
        e2e: float,
        prompt_tokens: int,
        generation_tokens: Sequence[int],
        n: int,
        best_of: int,
        finish_reasons: Sequence[str],
    ) -> None:
        """A request ran to its end. One generation length and one reason per sequence.

        Not for aborted requests, nor for prompts too long to be run: those are no part of the
        request histograms.
        """
        if not self.enabled:
            return
        self._e2e.observe(e2e)
        self._request_prompt.observe(prompt_tokens)
        for count in generation_tokens:
            self._request_generation.observe(count)
        self._n.observe(n)
        self._best_of.observe(best_of)
        for reason in finish_reasons:
            self._success.inc(reason)

    def on_aborted(self, cause: str) -> None:
        """``cause`` is a label: one of a few fixed words, never a client's text."""
        if self.enabled:
            self._success.inc("abort")
            self._aborted.inc(cause)

    def on_rejected(self, cause: str) -> None:
        if self.enabled:
            self._rejected.inc(cause)

    def on_failed(self, cause: str) -> None:
        if self.enabled:
            self._failed.inc(cause)

    def on_http_error(self, status: int) -> None:
        """A server's answer was an error; what the engine had been told of that request it has counted."""
        if self.enabled:
            self._http_errors.inc(str(status))

    def on_loop_lag(self, seconds: float) -> None:
        if self.enabled:
            self._lag.observe(max(0.0, seconds))

    def maybe_log(self, now: float, force: bool = False) -> None:
        """Log one line of statistics if LOG_INTERVAL has passed since the last, or if forced.

        ``now`` is any steady clock in seconds, the same one on every call.
        """
        if not self.enabled:
            return
        if self._logged_at is None:
            self._logged_at = now
            if not force:
                return
        elapsed = now - self._logged_at
        if elapsed < LOG_INTERVAL and not force:
            return
        if force and self.refresh is not None:
            self.refresh()
        prompt, generation = self._prompt_tokens.value, self._generation_tokens.value
        if elapsed > 0:
            self._prompt_rate.value = (prompt - self._logged_prompt) / elapsed
            self._generation_rate.value = (generation - self._logged_generation) / elapsed
            self._logged_at, self._logged_prompt, self._logged_generation = now, prompt, generation
        logger.info(
            "prompt %.1f tokens/s, generation %.1f tokens/s; requests: %d running, %d swapped, %d pending; "
            "KV cache: GPU %.1f%%, CPU %.1f%%",
            self._prompt_rate.value,
            self._generation_rate.value,
            self._running.value,
            self._swapped.value,
            self._waiting.value,
            100 * self._gpu_cache.value,
            100 * self._cpu_cache.value,
        )

    def render(self) -> bytes:
        """All series in the Prometheus text format; empty when disabled."""
        if not self.enabled:
            return b""
        if self.refresh is not None:
            self.refresh()
        return self._metrics.render()
