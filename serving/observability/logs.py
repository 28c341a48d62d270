"""Logs on standard error: lines for people, or one JSON object per line for machines."""

import json
import logging
import sys
import time
from typing import Any, TextIO

from serving.protocol.events import Event

SERVER = logging.getLogger("moejax")
"""The logger of all that an operator should know. Its records may carry `fields`, a dict for the JSON object."""
REQUESTS = logging.getLogger("moejax.requests")
"""The logger of requests: one record for each that ended, at level debug."""


def configure(form: str, level: str, stream: TextIO | None = None) -> None:
    """Send the logs of this program from `level` on to `stream`, or to standard error. `form` is text or json."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("moejax", "serving"):
        logging.getLogger(name).setLevel(level.upper())


def log_event(event: Event) -> None:
    """Log an event: a loss or a failure as a warning, any other as info."""
    warned = event.kind in ("rank_lost", "no_capacity", "suspected", "convicted") or "failed" in event.kind
    level = logging.WARNING if warned else logging.INFO
    words = [event.kind.replace("_", " "), f"epoch {event.epoch}"]
    words += [] if event.rank is None else [f"rank {event.rank}"]
    words += [text for text in (event.cause, event.message) if text]
    words += [", ".join(f"{name} {ms:.1f} ms" for name, ms in event.phases.items())] if event.phases else []
    fields = {"event": event.kind, "epoch": event.epoch, "rank": event.rank, "cause": event.cause}
    fields |= {"phases_ms": dict(event.phases)} if event.phases else {}
    SERVER.log(level, "; ".join(words), extra={"fields": fields})


class TextFormatter(logging.Formatter):
    """Formats a record as a line: seconds since the start, the level from warning on, and the message. A traceback
    follows on lines of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._began = time.time()

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"[{record.created - self._began:6.1f} s] {level}{record.getMessage()}{trace}"


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object: time, level, logger, message, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)
