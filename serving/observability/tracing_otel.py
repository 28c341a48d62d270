"""Traces by OpenTelemetry (optional extra `otel`): imported only when the settings ask for traces."""

from collections.abc import Mapping
from typing import Any

from opentelemetry import trace  # pyright: ignore[reportMissingImports]
from opentelemetry.context import Context  # pyright: ignore[reportMissingImports]
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # pyright: ignore[reportMissingImports]
from opentelemetry.sdk.resources import Resource  # pyright: ignore[reportMissingImports]
from opentelemetry.sdk.trace import TracerProvider  # pyright: ignore[reportMissingImports]
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter  # pyright: ignore[reportMissingImports]
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # pyright: ignore[reportMissingImports]

from serving.version import version


class OtlpTracer:
    """Sends spans in batches, in a thread of its own. See `serving.observability.tracing.Tracer`."""

    def __init__(self, endpoint: str, exporter: SpanExporter | None = None) -> None:
        resource = Resource.create({"service.name": "moejax", "service.version": version()})
        self._provider = TracerProvider(resource=resource)
        sender = exporter or OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"))
        self._provider.add_span_processor(BatchSpanProcessor(sender))
        self._tracer = self._provider.get_tracer("moejax", version())
        self._propagator = TraceContextTextMapPropagator()

    def span(self, name: str, start: float, end: float, attributes: Mapping[str, Any], *, parent: str = "") -> None:
        """See `serving.observability.tracing.Tracer.span`."""
        context = self._propagator.extract({"traceparent": parent}) if parent else Context()
        span = self._tracer.start_span(
            name, context, trace.SpanKind.SERVER, attributes=dict(attributes), start_time=_nanoseconds(start)
        )
        span.end(_nanoseconds(end))

    def phases(self, name: str, end: float, phases: Mapping[str, float], attributes: Mapping[str, Any]) -> None:
        """See `serving.observability.tracing.Tracer.phases`."""
        at = end - sum(phases.values()) / 1e3
        whole = self._tracer.start_span(name, Context(), attributes=dict(attributes), start_time=_nanoseconds(at))
        for phase, milliseconds in phases.items():
            child = self._tracer.start_span(phase, trace.set_span_in_context(whole), start_time=_nanoseconds(at))
            at += milliseconds / 1e3
            child.end(_nanoseconds(at))
        whole.end(_nanoseconds(end))

    def close(self) -> None:
        """See `serving.observability.tracing.Tracer.close`."""
        self._provider.shutdown()


def _nanoseconds(seconds: float) -> int:
    return int(1e9 * seconds)
