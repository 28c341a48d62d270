"""Traces: one span per request, one per recovery. The seam; `tracing_otel` speaks OpenTelemetry behind it."""

import contextvars
import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from serving.errors import StartError

TRACEPARENT: contextvars.ContextVar[str] = contextvars.ContextVar("traceparent", default="")
"""W3C trace context the running call came with."""


class Tracer(Protocol):
    """Where spans go. Times are in seconds since the epoch."""

    def span(self, name: str, start: float, end: float, attributes: Mapping[str, Any], *, parent: str = "") -> None:
        """Note something that is over. `parent` is a traceparent header, or empty."""
        ...

    def phases(self, name: str, end: float, phases: Mapping[str, float], attributes: Mapping[str, Any]) -> None:
        """Note a sequence of phases, in milliseconds, that ended at `end`: a span with one child for each."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


def open_tracer(endpoint: str) -> Tracer:
    """A tracer that sends to an OpenTelemetry collector (http://host:4317). Raises StartError without the packages."""
    try:
        module = importlib.import_module("serving.tracing_otel")
    except ModuleNotFoundError as error:
        raise StartError(f"--otlp-endpoint needs {error.name}: pip install 'moejax[otel]'.") from None
    return module.OtlpTracer(endpoint)
