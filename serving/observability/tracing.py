"""Traces: one span for each request and each recovery. `tracing_otel` implements `Tracer` with OpenTelemetry."""

import contextvars
import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from serving.errors import missing_extra

TRACEPARENT: contextvars.ContextVar[str] = contextvars.ContextVar("traceparent", default="")
"""The W3C trace context (traceparent header) of the running call, or empty."""


class Tracer(Protocol):
    """Receives spans. Times are in seconds since the epoch."""

    def span(self, name: str, start: float, end: float, attributes: Mapping[str, Any], *, parent: str = "") -> None:
        """Send a span that has ended. `parent` is a traceparent header, or empty."""
        ...

    def phases(self, name: str, end: float, phases: Mapping[str, float], attributes: Mapping[str, Any]) -> None:
        """Send a span that ended at `end`, with one child span for each phase. Phases are in milliseconds and followed
        each other."""
        ...

    def close(self) -> None:
        """Send the spans that are still buffered, and stop."""
        ...


def open_tracer(endpoint: str) -> Tracer:
    """A tracer that sends to an OpenTelemetry collector (http://host:4317). Raises StartError without the packages."""
    try:
        module = importlib.import_module("serving.observability.tracing_otel")
    except ModuleNotFoundError as error:
        raise missing_extra("--otlp-endpoint", error.name, "otel") from None
    return module.OtlpTracer(endpoint)
