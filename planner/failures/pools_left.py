"""The pools of a plan after a loss, and its cost on either side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from planner.cost.band import own_range
from planner.failures.loss_bands import LossBands, worst_ranges
from planner.failures.loss_model import LossModel, LossOutcome
from planner.failures.survivors import Survivors

ENDS: tuple[str, ...] = ("low", "mid", "high")


@dataclass(frozen=True, kw_only=True)
class PoolLeft:
    """One pool after a loss: the ranks left with their slots, and its rate in requests/s, 0 where it serves no more.

    `phases` are the seconds that its streams wait, none where it lost no rank. `requests` of broken groups have to be
    computed again; computed by the pool itself, the last of them takes `again` seconds. `ttft` is the seconds of its
    prompts.
    """

    losses: LossModel
    left: Survivors
    slots: int
    rate: float
    reason: str = ""
    phases: Mapping[str, float] = field(default_factory=dict)
    requests: float = 0.0
    again: float = 0.0
    ttft: float = 0.0
    outcome: LossOutcome | None = None

    @property
    def serves(self) -> bool:
        """True while it does work."""
        return self.rate > 0

    @property
    def stall(self) -> float:
        """Seconds that its streams wait."""
        return sum(self.phases.values())


@dataclass(frozen=True, kw_only=True)
class Share:
    """The cost of a loss on one side: the seconds by phase that running streams wait, the seconds that streams of dead
    ranks wait in all, and the share of the requests/s that this side has left."""

    bands: LossBands
    phases: Mapping[str, float]
    moved_stall: float
    capacity: float


@dataclass(frozen=True, kw_only=True)
class PoolsLeft:
    """All pools after a loss: the pools that decode now (`streams`), the cost on either side (`shares`), and the
    `reason` why no side can do the work of both, empty where the loss is survivable. `switched` ranks do that work."""

    streams: tuple[PoolLeft, ...] = ()
    shares: tuple[Share, ...] = ()
    switched: int = 0
    reason: str = ""

    @property
    def ranges(self) -> dict[str, dict[str, float]]:
        """`stall_ms`, `moved_stall_ms` and `capacity` as {low, mid, high}; empty for a loss that is not survivable."""
        return worst_ranges(each.bands.around(each.phases, each.moved_stall, each.capacity) for each in self.shares)

    def tpot_ms(self, requests: int) -> dict[str, float]:
        """Milliseconds between two tokens while `requests` run, shared out by tensor groups: the ranks' or the front's,
        whichever are more, in the slowest pool: {low, mid, high}."""
        groups = sum(each.left.data for each in self.streams)
        found: dict[str, float] = dict.fromkeys(ENDS, 0.0)
        for each in self.streams:
            own = ceil(requests * each.left.data / groups)
            seconds = each.losses.capacity_model.token_seconds(each.left, each.slots, own)
            front = own_range(each.losses.recovery.front.step_seconds(each.left.ranks, own))
            ranks = self.shares[0].bands.band.around(seconds, "tpot")
            found = {end: max(found[end], 1e3 * ranks[end], 1e3 * front[end]) for end in ENDS}
        return found


def pool_left(
    losses: LossModel,
    left: Survivors,
    *,
    reason: str = "",
    phases: Mapping[str, float] | None = None,
    outcome: LossOutcome | None = None,
) -> PoolLeft:
    """The pool whose losses `losses` prices with these ranks left. With a `reason` it serves no more; `phases` are the
    seconds that its streams wait, of its `outcome` where that is known."""
    model, slots = losses.capacity_model, losses.slots_after(left)[0]
    after = model.whole if reason else model.predict(left, slots)
    reason = reason or ("" if after.tokens_per_second else after.reason or "it has no room for a request")
    if reason:
        everything = model.whole.requests_per_group * model.shape.data
        none: dict[str, Any] = {"rate": 0.0, "reason": reason, "requests": everything, "outcome": outcome}
        return PoolLeft(losses=losses, left=left, slots=slots, **none)
    return PoolLeft(
        losses=losses,
        left=left,
        slots=slots,
        rate=after.tokens_per_second / losses.deployment.traffic.output,
        phases=phases or {},
        requests=left.broken_groups * model.whole.requests_per_group * losses.recomputed,
        again=losses.recompute(left, after)[1],
        ttft=after.ttft_seconds,
        outcome=outcome,
    )
