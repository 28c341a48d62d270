"""Months of failures, simulated in seconds: the same random timeline under each policy.

All policies see the same timeline (`planner.failures.timeline`). What a loss costs and what it leaves is as `degrade`
and `certify` have it: the same rules for slots, roles and pools, and the same throughput of the ranks left, from the
state that earlier losses have left.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from planner.errors import InputError, unknown_key
from planner.failures.loss_bands import LossBands
from planner.failures.loss_model import MEANS, LossModel
from planner.failures.pool_losses import PoolLossModel
from planner.failures.sides import TOGETHER, MeshSides, PoolSides, Sides
from planner.failures.timeline import FailureEvent
from planner.inputs.cluster import Device
from planner.inputs.recovery_times import RecoveryTimes
from planner.plan.deployment import Deployment
from planner.plan.plan import PlannedRank
from planner.plan.pools import AnyDeployment, PooledDeployment

POLICIES = ("restart", "mask", "copy", "spare", "switch")
_COPY = frozenset(MEANS) - {"mask", "spare", "switch"}
MEANS_OF = {
    "restart": frozenset(MEANS) - {"mask"},
    "mask": (_COPY - {"store", "regrow"}) | {"mask"},
    "copy": _COPY,
    "spare": _COPY | {"spare"},
    "switch": _COPY | {"switch"},
}
"""The means of recovery of each policy."""


@dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """The cost of one policy; shares are of the whole time, or of the tokens of a cluster without failures.

    `side` is the part of a plan of pools that it is of: "prefill", "decode", or "together", as for a plan of one mesh.
    `stall_low` and `stall_high` are the ends of the range of `stall_seconds`, `goodput_low` and `goodput_high` those of
    `goodput_lost`, of `hours` in all (`planner.failures.loss_bands`). In `degraded_hours` experts were masked, in
    `reduced_hours` throughput was below full, in `outage_hours` zero; in `switched_hours` one side did the work of
    both.
    """

    policy: str
    failures: int
    availability: float
    goodput_lost: float
    outage_hours: float
    degraded_hours: float
    reduced_hours: float
    stall_seconds: float
    tokens_recomputed: float
    store_bytes: float
    most_dead: int
    stall_low: float = 0.0
    stall_high: float = 0.0
    goodput_low: float = 0.0
    goodput_high: float = 0.0
    switched_hours: float = 0.0
    hours: float = 0.0
    side: str = TOGETHER

    @property
    def availability_range(self) -> tuple[float, float]:
        """The ends of the availability: with the longest and the shortest stalls."""
        up = [1 - (self.outage_hours + stall / 3600) / self.hours for stall in (self.stall_high, self.stall_low)]
        return up[0], up[1]

    def to_dict(self) -> dict:
        """The result for JSON."""
        low, high = self.availability_range
        ranges = {
            "availability": {"low": low, "mid": self.availability, "high": high},
            "goodput_lost": {"low": self.goodput_low, "mid": self.goodput_lost, "high": self.goodput_high},
            "stall_seconds": {"low": self.stall_low, "mid": self.stall_seconds, "high": self.stall_high},
        }
        return {**asdict(self), "ranges": ranges}


def simulate(
    deployment: AnyDeployment,
    events: list[FailureEvent],
    *,
    days: float,
    policies: tuple[str, ...] | None = None,
    recovery: RecoveryTimes | None = None,
    spares: int | None = None,
    without: Collection[str] = (),
) -> list[PolicyResult]:
    """The results of each policy over the same events: one, and of a plan of pools also one for either side.

    Under the policy "spare" the standby ranks of the plan take the place of dead ones, and `spares` more (None: 1 % of
    the ranks where the plan has none). "switch" is for disaggregated plans and for pools, "spare" not for pools.
    `without` are means of recovery that no policy has. InputError for an unknown policy or number of spares.
    """
    known = _policies_of(deployment)
    for policy in policies or ():
        if policy not in POLICIES:
            raise unknown_key(policy, POLICIES, "--policies")
        if policy not in known:
            reason = (
                "no rank stands by in pools"
                if policy == "spare"
                else "every rank of this plan attends; solve with --arch disaggregated or --arch pd"
            )
            raise InputError(f"policy {policy}: {reason}")
    more = _spares(deployment, spares)
    times = recovery or _decode(deployment).recovery or RecoveryTimes()
    found = []
    for policy in policies or known:
        waiting = more if policy == "spare" else 0
        fixed = waiting / (waiting + sum(len(pool.plan.ranks) for pool in _pools(deployment)))
        sides = _sides(deployment, recovery, MEANS_OF[policy] - set(without), waiting)
        found += _PolicyRun(sides, policy, times, fixed).play(events, days)
    return found


def _policies_of(deployment: AnyDeployment) -> tuple[str, ...]:
    """The policies that apply to a plan."""
    if isinstance(deployment, PooledDeployment):
        return tuple(policy for policy in POLICIES if policy != "spare")
    apart = any(r.role == "attention" for r in deployment.plan.ranks)
    return tuple(policy for policy in POLICIES if policy != "switch" or apart)


def _decode(deployment: AnyDeployment) -> Deployment:
    """The deployment whose streams the results are of."""
    return deployment.decode if isinstance(deployment, PooledDeployment) else deployment


def _spares(deployment: AnyDeployment, spares: int | None) -> int:
    """The ranks that stand by beside those of the plan."""
    ranks = sum(len(pool.plan.ranks) for pool in _pools(deployment))
    if spares is not None and not 0 <= spares < ranks:
        raise InputError(f"--spares is {spares} of {ranks} ranks; it must be at least 0, and one at least must serve")
    if spares is not None:
        return spares
    waiting = any(r.role == "standby" for r in _decode(deployment).plan.ranks)
    return 0 if waiting else max(1, ranks // 100)


def _pools(deployment: AnyDeployment) -> tuple[Deployment, ...]:
    return tuple(deployment.pools().values()) if isinstance(deployment, PooledDeployment) else (deployment,)


def _sides(deployment: AnyDeployment, recovery: RecoveryTimes | None, means: Collection[str], spares: int) -> Sides:
    """The sides of a plan before any failure, with so many more ranks that stand by."""
    if isinstance(deployment, PooledDeployment):
        return PoolSides(PoolLossModel(deployment, recovery, means))
    bands = LossBands(LossModel(deployment, recovery))
    return MeshSides(LossModel(with_spares(deployment, spares), recovery, means), bands)


def with_spares(deployment: Deployment, spares: int) -> Deployment:
    """The deployment with more ranks that stand by, each on a host of its own."""
    if not spares:
        return deployment
    plan, cluster = deployment.plan, deployment.cluster
    first, kind = cluster.ids[-1] + 1, cluster.devices[-1].kind
    ids = range(first, first + spares)
    devices = tuple(Device(id=i, host=f"spare {i}", rack="", kind=kind) for i in ids)
    ranks = tuple(PlannedRank(id=i, host=f"spare {i}", role="standby") for i in ids)
    return replace(
        deployment,
        plan=replace(plan, ranks=(*plan.ranks, *ranks)),
        cluster=replace(cluster, devices=(*cluster.devices, *devices)),
    )


class _Bill:
    """The totals of one side so far."""

    def __init__(self, band: LossBands) -> None:
        self.band = band
        self.sums: defaultdict[str, float] = defaultdict(float)

    def stall(self, phases: Mapping[str, float]) -> None:
        """Add the seconds of the phases of a recovery, and the ends of their range."""
        for name, seconds in zip(("low", "stall", "high"), self.band.stall(phases), strict=True):
            self.sums[name] += seconds

    def spend(self, hours: float, capacity: float, *, masked: bool, switched: bool, fixed: float) -> None:
        """Add `hours` with this share of the throughput, of which spares keep the share `fixed` at all times."""
        rate, missing = self.band.band.rate, 1 - capacity
        ends = {"lost": missing, "least": missing / rate, "most": min(1.0, missing * rate)}
        for name, share in ends.items():
            self.sums[name] += hours * (1 - (1 - fixed) * (1 - (share if capacity else 1.0)))
        self.sums["outage"] += hours * (capacity == 0)
        self.sums["reduced"] += hours * (0 < capacity < 1)
        self.sums["degraded"] += hours * (masked and capacity > 0)
        self.sums["switched"] += hours * switched

    def result(self, side: str, policy: str, hours: float, failures: int, most_dead: int) -> PolicyResult:
        """The totals after `hours`."""
        s = self.sums
        return PolicyResult(
            side=side,
            policy=policy,
            failures=failures,
            availability=1 - (s["outage"] + s["stall"] / 3600) / hours,
            goodput_lost=(s["lost"] + s["stall"] / 3600) / hours,
            goodput_low=(s["least"] + s["low"] / 3600) / hours,
            goodput_high=min(1.0, (s["most"] + s["high"] / 3600) / hours),
            outage_hours=s["outage"],
            degraded_hours=s["degraded"],
            reduced_hours=s["reduced"],
            switched_hours=s["switched"],
            stall_seconds=s["stall"],
            tokens_recomputed=s["tokens"],
            store_bytes=s["store"],
            most_dead=most_dead,
            stall_low=s["low"],
            stall_high=s["high"],
            hours=hours,
        )


class _PolicyRun:
    """The state of one policy while events pass: the sides of the plan, the dead ranks, and the totals so far.

    `fixed` is the share of all ranks that stand by beside those of the plan.
    """

    def __init__(self, sides: Sides, policy: str, times: RecoveryTimes, fixed: float) -> None:
        self.sides, self.policy, self.times, self.fixed = sides, policy, times, fixed
        self.now = sides.now()
        self.bills = {name: _Bill(sides.bands[name]) for name in self.now}
        self.down: Counter[int] = Counter()
        self.failures: Counter[str] = Counter()
        self.most_dead: Counter[str] = Counter()

    def play(self, events: Sequence[FailureEvent], days: float) -> list[PolicyResult]:
        """Apply all events in order, and return the totals of each side."""
        now, end = 0.0, days * 24
        for event in sorted(events, key=lambda each: each.hour):
            self._pass(event.hour - now)
            now = event.hour
            (self._up if event.up else self._down)(event.ids)
        self._pass(end - now)
        return [
            bill.result(name, self.policy, end, self.failures[name], self.most_dead[name])
            for name, bill in self.bills.items()
        ]

    def _pass(self, hours: float) -> None:
        """Add `hours` in the present state to the totals."""
        for name, side in self.now.items():
            self.bills[name].spend(hours, side.capacity, masked=side.masked, switched=side.switched, fixed=self.fixed)

    def _down(self, ids: Sequence[int]) -> None:
        new = [i for i in ids if not self.down[i]]
        self.down.update(ids)
        if not new:
            return
        dead = {i for i, count in self.down.items() if count}
        for name, members in self.sides.members.items():
            self.failures[name] += not members.isdisjoint(new)
            self.most_dead[name] = max(self.most_dead[name], len(dead & members))
        before = self.now
        losses = self.sides.lose([i for i in new if i in self.sides.members[TOGETHER]])
        self.now = self.sides.now()
        for name, loss in losses.items():
            bill = self.bills[name]
            bill.sums["store"] += loss.store_bytes
            if self.policy == "restart":
                bill.sums["tokens"] += before[name].cached_tokens
                if self.now[TOGETHER].capacity:
                    bill.stall({"detect": self.times.detect, "restart": self.times.restart})
            else:
                bill.sums["tokens"] += loss.tokens
                bill.stall(loss.phases)

    def _up(self, ids: Sequence[int]) -> None:
        self.down.subtract(ids)
        back = [i for i in ids if not self.down[i]]
        if not back:
            return
        before = self.now
        waits = self.sides.restore([i for i in back if i in self.sides.members[TOGETHER]])
        self.now = self.sides.now()
        for name, bill in self.bills.items():
            if self.policy == "restart":
                bill.sums["tokens"] += before[name].cached_tokens
            if self.policy == "restart" and self.now[TOGETHER].capacity:
                bill.stall({"restart": self.times.restart})
            elif self.policy != "restart" and name in waits and self.now[name].capacity:
                bill.stall({"rejoin": self.times.rejoin})
