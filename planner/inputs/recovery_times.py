"""The length of the phases of a recovery: estimates, or measured by benchmarks or by a server in its own recoveries."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from statistics import median

from planner.errors import InputError
from planner.inputs.file_kinds import FileKind

RESULT = FileKind(
    no="no result of benchmarks.recovery", way_out="Give the file of `python -m benchmarks.recovery --json FILE`."
)


@dataclass(frozen=True, kw_only=True)
class RecoveryTimes:
    """Seconds of the phases whose length does not depend on the loss; `source` is "estimate" or "measured".

    detect: from the death to its suspicion; abort: until the collectives of survivors have ended; adopt: until
    executables and arrays of the prepared mesh are in place; first_step: the first step after it, None where that is
    left to the model; restart: of the whole server, with warm caches; rejoin: the pause of streams while a rank
    returns.

    Estimates are of a server so small that the front's messages take no time (`ranks` 0). Measured phases hold the
    messages to the `ranks` ranks that were left.
    """

    detect: float = 0.020
    abort: float = 0.030
    adopt: float = 0.050
    restart: float = 83.1
    rejoin: float = 1.0
    first_step: float | None = None
    ranks: int = 0
    source: str = "estimate"

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "source" or (f.name == "first_step" and value is None):
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < inf:
                raise InputError(f"recovery: {f.name} is {value!r}, it must be a number of at least 0")


def read_recovery_times(path: str | Path) -> RecoveryTimes:
    """Phases measured by `python -m benchmarks.recovery --json FILE`: medians of its kills and its summary.

    The stall of survivors' streams beyond detection and adoption counts as abort, with the messages and the first step
    in it. InputError for any other file.
    """
    return RESULT.read(path, _recovery_times)


def _recovery_times(text: str) -> RecoveryTimes:
    """The phases in the text of such a result."""
    data = RESULT.parse_object(text, "summary")
    try:
        summary = data["summary"]
        kills = data.get("kills") or data.get("runs") or []
        detect = _milliseconds(summary["detect_ms"])
        adopt = [k["adopt_ms"] for k in kills if k.get("adopt_ms") is not None]
        adopt_ms = float(median(adopt)) if adopt else 0.0
        stall = _milliseconds(summary["survivor_stall_ms"])
        return RecoveryTimes(
            detect=detect / 1e3,
            adopt=adopt_ms / 1e3,
            abort=max(0.0, stall - detect - adopt_ms) / 1e3,
            restart=float(summary.get("warm_restart_s") or RecoveryTimes.restart),
            rejoin=(_milliseconds(summary.get("rejoin_pause_ms")) or 1e3) / 1e3,
            first_step=0.0,
            ranks=max(0, int(data.get("ranks", 1)) - 1),
            source="measured",
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RESULT.wrong(error) from None


def _milliseconds(value: object) -> float:
    if isinstance(value, dict):
        value = value.get("median")
    return float(value) if isinstance(value, (int, float)) else 0.0
