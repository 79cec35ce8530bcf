"""OpenTelemetry spans, one for each request of the engine.

Names are those of the semantic conventions for generative AI; the times in the queue, to the first token and
in total carry those that dashboards for this kind of server already know, ``gen_ai.latency.*``, in seconds.
A span holds numbers and names, never what a request says, who sent it, or a key.

Spans are made when a request has ended, from the times its engine noted, and handed to a thread that sends
them: nothing is done while tokens are made.
"""

from __future__ import annotations

import importlib.util
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from aserve.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from werkzeug.datastructures import Headers

    from aserve.messages.params import SamplingParams

_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_SEND_SECONDS = 5.0
"""Seconds that reaching the collector may take, also at shutdown."""

_OPERATIONS = {
    "chat/completions": "chat",
    "messages": "chat",
    "responses": "chat",
    "embeddings": "embeddings",
}
"""By the end of a path; all else completes text."""

_caller: ContextVar[tuple[Context | None, str] | None] = ContextVar("caller", default=None)
"""The trace that the present call belongs to, and its operation."""


def check_endpoint(endpoint: str) -> None:
    """ConfigError: spans cannot be sent there, or the packages that do it are missing."""
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            "otlp_traces_endpoint must be the http:// or https:// address of a collector's OTLP/HTTP "
            f"receiver, such as http://localhost:4318/v1/traces, got {endpoint!r}",
            param="otlp_traces_endpoint",
        )
    if any(_missing(name) for name in _PACKAGES):
        raise ConfigError(
            "otlp_traces_endpoint needs OpenTelemetry's SDK and exporter; pip install 'aserve[otel]'",
            param="otlp_traces_endpoint",
        )


def _missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:  # of a parent
        return True


def exporter_to(endpoint: str) -> SpanExporter:
    """Sends spans to ``endpoint``; further settings come from the SDK's own environment variables."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, timeout=_SEND_SECONDS)


class RequestTraces:
    """Spans of the requests of one engine; what samples them is set by ``OTEL_TRACES_SAMPLER``."""

    def __init__(self, exporter: SpanExporter, model: str) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        import aserve

        named = SERVICE_NAME in OTELResourceDetector().detect().attributes  # by the environment
        resource = Resource.create(None if named else {SERVICE_NAME: "aserve"})
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self.provider.get_tracer("aserve", aserve.__version__)
        self._propagator = TraceContextTextMapPropagator()
        self._kind, self._failed = SpanKind.SERVER, Status(StatusCode.ERROR)
        self._model = model
        self._open: dict[str, tuple[Context | None, str]] = {}

    def note_caller(self, headers: Headers, path: str) -> None:
        """Says on whose behalf the present task calls: its W3C ``traceparent``, if that makes sense, and the
        operation that a route stands for."""
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        context = self._propagator.extract(carrier) if carrier else None
        operations = (kind for end, kind in _OPERATIONS.items() if path.rstrip("/").endswith(end))
        _caller.set((context, next(operations, "text_completion")))

    def began(self, request_id: str) -> None:
        """A request of the present task has been queued."""
        self._open[request_id] = _caller.get() or (None, "text_completion")

    def ended(self, cause: str, params: SamplingParams | None, facts: dict[str, Any]) -> None:
        """It has ended; as :class:`aserve.engine.output.Tracer` says."""
        context, operation = self._open.pop(facts["id"], (None, "text_completion"))
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=context,
            kind=self._kind,
            attributes=self._attributes(operation, cause, params, facts),
            start_time=int(facts["arrival_time"] * 1e9),
        )
        if cause.startswith("failed"):
            span.set_status(self._failed)
        span.end()

    def _attributes(
        self, operation: str, cause: str, params: SamplingParams | None, facts: dict[str, Any]
    ) -> dict[str, Any]:
        found: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "aserve",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.response.id": facts["id"],
            "gen_ai.usage.input_tokens": facts["prompt_tokens"],
            "gen_ai.usage.output_tokens": facts["generated_tokens"],
            "gen_ai.usage.cache_read.input_tokens": facts["cached_tokens"],
            "gen_ai.latency.e2e": facts["seconds"],
            "gen_ai.latency.time_in_queue": facts["queue_seconds"],
            "gen_ai.latency.time_to_first_token": facts["first_token_seconds"],
            "gen_ai.response.time_to_first_chunk": facts["first_token_seconds"],
            # What follows the colon may be anything; the engine's log has it.
            "aserve.cause": cause if cause.startswith("aborted") else cause.partition(":")[0],
        }
        if params is not None:
            found["gen_ai.request.temperature"] = params.temperature
            found["gen_ai.request.top_p"] = params.top_p
            found["gen_ai.request.max_tokens"] = params.max_tokens
            found["gen_ai.request.choice.count"] = params.n if params.n > 1 else None
            found["gen_ai.response.finish_reasons"] = facts["finish_reasons"] or None
        if cause.startswith("failed"):
            found["error.type"] = "RequestFailedError"
        elif cause.startswith("aborted"):
            found["error.type"] = "timeout" if cause == "aborted: timeout" else "cancelled"
        return {name: value for name, value in found.items() if value is not None}

    def close(self) -> None:
        """Sends what has not been sent and ends the thread."""
        self.provider.shutdown()
