"""What the server writes to standard error: lines for people, or one JSON object per line for machines."""

import json
import logging
import sys
import time
from typing import Any, TextIO

from serving.status import Event

SERVER = logging.getLogger("moejax")
"""What an operator should know. Its records may carry `fields`."""
REQUESTS = logging.getLogger("moejax.requests")
"""One record for each request that ended, at level debug."""


def configure(form: str, level: str, stream: TextIO | None = None) -> None:
    """Send the logs of this program to `stream` (standard error), as text or json, from `level` on."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("moejax", "serving"):
        logging.getLogger(name).setLevel(level.upper())


def log_event(event: Event) -> None:
    """Log what happened to the server."""
    level = logging.WARNING if event.kind in ("rank_lost", "no_capacity") or "failed" in event.kind else logging.INFO
    words = [event.kind.replace("_", " "), f"epoch {event.epoch}"]
    words += [] if event.rank is None else [f"rank {event.rank}"]
    words += [text for text in (event.cause, event.message) if text]
    words += [", ".join(f"{name} {ms:.1f} ms" for name, ms in event.phases.items())] if event.phases else []
    fields = {"event": event.kind, "epoch": event.epoch, "rank": event.rank, "cause": event.cause}
    fields |= {"phases_ms": dict(event.phases)} if event.phases else {}
    SERVER.log(level, "; ".join(words), extra={"fields": fields})


class Lines(logging.Formatter):
    """Seconds since the start and the message; the level where it is a warning or worse, the traceback below."""

    def __init__(self) -> None:
        super().__init__()
        self._began = time.time()

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"[{record.created - self._began:6.1f} s] {level}{record.getMessage()}{trace}"


class JsonLines(logging.Formatter):
    """An object with time, level, logger and message, the record's own fields beside them."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
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
