"""The ranges around the figures of a loss: each phase is off by a factor of its own, all in the same direction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from planner.cost.band import OWN, UNCHECKED, deployment_band, range_text
from planner.failures.loss_model import LossModel, LossOutcome

FIXED = ("detect", "abort", "adopt", "restart", "rejoin")
Ranges = Mapping[str, Mapping[str, float]]


class LossBands:
    """The ranges of all losses of one deployment.

    Phases that are estimates may be off by UNCHECKED, as loading weights; measured ones and the front's messages by
    OWN; a predicted first step and the prompts of lost requests by the factors of the band of the deployment; and the
    capacity that is lost, not what is left, by that of tokens/s. In pools, the prompts of lost requests may be off by
    UNCHECKED too.
    """

    def __init__(self, losses: LossModel) -> None:
        d, whole, times = losses.deployment, losses.capacity_model.whole, losses.recovery.times
        self.band = deployment_band(d, d.shape, whole.requests_per_group)
        self.measured = times.source == "measured"
        fixed = OWN if self.measured else UNCHECKED
        first = self.band.tpot if times.first_step is None else fixed
        self.factors = {**dict.fromkeys(FIXED, fixed), "messages": OWN, "weights": UNCHECKED, "step": first}
        self.again = max(UNCHECKED, self.band.ttft) if d.work != "all" else self.band.ttft
        self.factors["prompts"] = self.again

    def of(self, outcome: LossOutcome) -> dict[str, dict[str, float]]:
        """`stall_ms`, `moved_stall_ms` and `capacity` as {low, mid, high}; empty for a loss that is not survivable."""
        if not outcome.survivable:
            return {}
        return self.around(outcome.phases, outcome.moved_stall, outcome.capacity)

    def around(self, phases: Mapping[str, float], moved_stall: float, capacity: float) -> dict[str, dict[str, float]]:
        """The same for the seconds of `phases`, the seconds that streams of dead ranks wait, and the capacity left."""
        low, mid, high = self.stall(phases)
        again = max(0.0, moved_stall - mid)
        return {
            "stall_ms": _range(low * 1e3, mid * 1e3, high * 1e3),
            "moved_stall_ms": _range(
                (low + again / self.again) * 1e3, moved_stall * 1e3, (high + again * self.again) * 1e3
            ),
            "capacity": {
                "low": max(0.0, 1 - (1 - capacity) * self.band.rate),
                "mid": capacity,
                "high": min(1.0, 1 - (1 - capacity) / self.band.rate),
            },
        }

    def stall(self, phases: Mapping[str, float]) -> tuple[float, float, float]:
        """The sum of `phases` in seconds: low, mid, high."""
        low = sum(seconds / self.factors[phase] for phase, seconds in phases.items())
        high = sum(seconds * self.factors[phase] for phase, seconds in phases.items())
        return low, sum(phases.values()), high

    def source(self) -> str:
        """The reason for the width of the ranges, in a sentence."""
        phases = f"measured phases {OWN:g}" if self.measured else f"estimated phases {UNCHECKED:g}"
        return f"ranges: {phases}, messages {OWN:g}, weights {UNCHECKED:g}, first step and prompts {self.band.source()}"

    def to_dict(self) -> dict[str, Any]:
        """The factors for JSON."""
        factors = {**self.factors, "lost_capacity": self.band.rate}
        return {**self.band.to_dict(), "phase_factors": factors}


def worst_ranges(rows: Iterable[Ranges]) -> dict[str, dict[str, float]]:
    """The worst of each figure of `rows`, and of each end of its range: the least capacity, the most of all others."""
    rows = [row for row in rows if row]
    return {
        name: {end: (min if name == "capacity" else max)(row[name][end] for row in rows) for end in rows[0][name]}
        for name in (rows[0] if rows else ())
    }


def _range(low: float, mid: float, high: float) -> dict[str, float]:
    return {"low": low, "mid": mid, "high": high}


def range_cells(ranges: Ranges) -> tuple[str, str, str]:
    """The stall, the stall of streams of dead ranks, and the capacity as ranges; `-` without any."""
    if not ranges:
        return "-", "-", "-"
    left = ranges["capacity"]
    shares = sorted({f"{100 * left['low']:.1f}", f"{100 * left['high']:.1f}"}, key=float)
    return range_text(ranges["stall_ms"]), range_text(ranges["moved_stall_ms"]), "-".join(shares) + "%"
