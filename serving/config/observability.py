"""Settings of logs and traces."""

import dataclasses
from typing import ClassVar

from serving.config.field import SettingsGroup, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObservabilitySettings(SettingsGroup):
    """How the server logs, and where it sends traces."""

    title: ClassVar[str] = "Logs and traces"

    log_format: str = setting(
        "text",
        "Format of the log on standard error: lines for people (text) or JSON objects (json).",
        choices=("text", "json"),
    )
    log_level: str = setting(
        "info", "Lowest level of the messages that are logged.", choices=("debug", "info", "warning", "error")
    )
    otlp_endpoint: str | None = setting(
        None, "Address that OpenTelemetry traces are sent to over gRPC (needs the extra moejax[otel])."
    )
