"""How long each phase of a recovery takes, and what it costs in answers when experts are missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from planner.errors import InputError

# Share of experts masked against the average score of ten tasks, worst-case choice of experts
# (ReviveMoE, arXiv 2602.21140); the generation task GSM8k falls faster: 0.641, 0.540 at 1/8, 0.318 at 1/4.
SCORES = (
    (0.0, 0.683),
    (1 / 64, 0.681),
    (1 / 32, 0.681),
    (1 / 16, 0.675),
    (1 / 8, 0.663),
    (1 / 4, 0.625),
    (1 / 2, 0.542),
)


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Seconds of the phases whose length does not depend on the loss. `source` tags where they come from.

    detect: death to suspicion; abort: collectives of survivors ended; adopt: executables and arrays of the
    prepared mesh in place; restart: the whole server again, caches warm; rejoin: pause for a returning rank.
    """

    detect: float = 0.020
    abort: float = 0.030
    adopt: float = 0.050
    restart: float = 83.1
    rejoin: float = 1.0
    source: str = "estimate"

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "source" and (not isinstance(value, (int, float)) or value < 0):
                raise InputError(f"recovery: {f.name} is {value!r}, it must be a number of at least 0")


def read_recovery(path: str | Path) -> Recovery:
    """Phases measured by `python -m benchmarks.recovery --json FILE`: medians of its kills and its summary.

    What survivors' streams wait beyond detection and adoption counts as abort.
    """
    try:
        data = json.loads(Path(path).read_text())
        summary = data["summary"]
        kills = data.get("kills") or data.get("runs") or []
        detect = _milliseconds(summary["detect_ms"])
        adopt = [k["adopt_ms"] for k in kills if k.get("adopt_ms") is not None]
        adopt_ms = float(np.median(adopt)) if adopt else 0.0
        stall = _milliseconds(summary["survivor_stall_ms"])
        return Recovery(
            detect=detect / 1e3,
            adopt=adopt_ms / 1e3,
            abort=max(0.0, stall - detect - adopt_ms) / 1e3,
            restart=float(summary.get("warm_restart_s") or Recovery.restart),
            rejoin=(_milliseconds(summary.get("rejoin_pause_ms")) or 1e3) / 1e3,
            source="measured",
        )
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no result of benchmarks.recovery: {type(error).__name__} {error}") from None


def _milliseconds(value: object) -> float:
    if isinstance(value, dict):
        value = value.get("median")
    return float(value) if isinstance(value, (int, float)) else 0.0


def score_kept(share: float) -> float:
    """Part of the average task score left when `share` of the experts is masked (SCORES, linear between)."""
    x, y = zip(*SCORES, strict=True)
    return float(np.interp(share, x, y) / SCORES[0][1])
