"""The ranges around the seconds of a loss: each phase is off by a factor of its own, all in the same direction."""

from __future__ import annotations

from planner.cost.band import UNCHECKED, Band, band_of
from planner.failures.loss_model import LossModel, LossOutcome

FIXED = ("detect", "abort", "adopt")
OWN = 1.25
"""The error factor of phases that were measured, and of the front's messages, which follow lines through measurements:
an assumption."""


def loss_band(losses: LossModel) -> Band:
    """The band of the steps and first tokens of the deployment whose losses these are."""
    d, whole = losses.deployment, losses.capacity_model.whole
    return band_of(d.workload, d.cluster, d.shape, whole.requests_per_group, d.traffic.prompt)


def loss_ranges(losses: LossModel, outcome: LossOutcome) -> dict[str, dict[str, float]]:
    """`stall_ms` and `moved_stall_ms` as {low, mid, high}.

    Phases that are estimates may be off by UNCHECKED, as loading weights; measured ones and messages by OWN; the first
    step and the prompts of lost requests by the factors of the band.
    """
    band = loss_band(losses)
    measured = OWN if losses.recovery.times.source == "measured" else UNCHECKED
    factors = {**dict.fromkeys(FIXED, measured), "messages": OWN, "weights": UNCHECKED, "step": band.tpot}
    low = sum(seconds / factors[phase] for phase, seconds in outcome.phases.items())
    high = sum(seconds * factors[phase] for phase, seconds in outcome.phases.items())
    again = max(0.0, outcome.moved_stall - outcome.stall)
    return {
        "stall_ms": {"low": low * 1e3, "mid": outcome.stall * 1e3, "high": high * 1e3},
        "moved_stall_ms": {
            "low": (low + again / band.ttft) * 1e3,
            "mid": outcome.moved_stall * 1e3,
            "high": (high + again * band.ttft) * 1e3,
        },
    }
