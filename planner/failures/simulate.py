"""Months of failures, simulated in seconds: the same random timeline under each policy.

All policies see the same timeline (`planner.failures.timeline`). Throughput is taken as proportional to the tensor
groups without a failed rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from planner.cost.recovery_model import RecoveryModel, store_seconds
from planner.errors import InputError, unknown_key
from planner.failures.loss_bands import LossBands
from planner.failures.loss_model import LossModel
from planner.failures.timeline import FailureEvent
from planner.inputs.recovery_times import RecoveryTimes
from planner.plan.deployment import Deployment
from planner.plan.plan import ATTENTION_ROLES
from planner.solver.balance import host_index

POLICIES = ("restart", "mask", "copy", "spare", "switch")


@dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """The cost of one policy; shares are of the whole time, or of the tokens of a cluster without failures.

    `stall_low` and `stall_high` are the ends of the range of `stall_seconds`, of `hours` in all
    (`planner.failures.loss_bands`). In `degraded_hours` experts were masked, in `reduced_hours` throughput was below
    full, in `outage_hours` zero.
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
    hours: float = 0.0

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
            "stall_seconds": {"low": self.stall_low, "mid": self.stall_seconds, "high": self.stall_high},
        }
        return {**asdict(self), "ranges": ranges}


def simulate(
    deployment: Deployment,
    events: list[FailureEvent],
    *,
    days: float,
    policies: tuple[str, ...] | None = None,
    recovery: RecoveryTimes | None = None,
    spares: int | None = None,
    seed: int = 0,
) -> list[PolicyResult]:
    """One result per policy over the same events. `spares` ranks stand by under the policy "spare".

    "switch" is for disaggregated plans only. InputError for an unknown policy or number of spares.
    """
    apart = any(r.role == "attention" for r in deployment.plan.ranks)
    policies = policies or tuple(p for p in POLICIES if p != "switch" or apart)
    for policy in policies:
        if policy not in POLICIES:
            raise unknown_key(policy, POLICIES, "--policies")
        if policy == "switch" and not apart:
            raise InputError("policy switch: every rank of this plan attends; solve with --arch disaggregated")
    ranks = len(deployment.plan.ranks)
    spares = max(1, ranks // 100) if spares is None else spares
    if not 0 <= spares < ranks:
        raise InputError(f"--spares is {spares} of {ranks} ranks; it must be at least 0, and one at least must serve")
    model = RecoveryModel.of(deployment.workload, recovery or deployment.recovery)
    bands = LossBands(LossModel(deployment, model.times))
    return [
        _PolicyRun(deployment, policy, model, bands, spares if policy == "spare" else 0, seed).play(events, days)
        for policy in policies
    ]


class _PolicyRun:
    """The state of one policy while events pass: dead ranks, the expert in each slot, and the totals so far."""

    def __init__(
        self, deployment: Deployment, policy: str, recovery: RecoveryModel, bands: LossBands, spares: int, seed: int
    ) -> None:
        plan = deployment.plan
        self.deployment, self.policy, self.recovery, self.spares = deployment, policy, recovery, spares
        self.bands = bands
        self.rng = np.random.default_rng(seed)
        self.table = plan.slots_by_rank()
        self.original = self.table.copy()
        self.counts = plan.copies().astype(np.int64)
        self.position = {rank: at for at, rank in enumerate(plan.expert_rank_ids)}
        self.alive = np.ones(len(plan.expert_ranks), bool)
        self.host = host_index(plan.expert_ranks)
        self.group_of = {r.id: r.group for r in plan.ranks if r.role in ATTENTION_ROLES}
        self.broken: dict[int, int] = {}
        self.down: dict[int, int] = {}
        whole = plan.figure("requests_per_group", 1.0)
        self.cache_tokens = whole * deployment.traffic.context
        self.groups = max(1, len(set(self.group_of.values())))
        self.bill: dict[str, float] = dict.fromkeys(
            ("outage", "lost", "degraded", "reduced", "stall", "low", "high", "tokens", "store"), 0.0
        )
        self.most_dead = self.failures = 0

    def play(self, events: list[FailureEvent], days: float) -> PolicyResult:
        """Apply all events in order, and return the totals."""
        now, end = 0.0, days * 24
        queue = [(e.hour, i) for i, e in enumerate(events)]
        heapq.heapify(queue)
        while queue:
            hour, i = heapq.heappop(queue)
            self._pass(hour - now)
            now = hour
            (self._up if events[i].up else self._down)(events[i].ids)
        self._pass(end - now)
        bill = self.bill
        return PolicyResult(
            policy=self.policy,
            failures=self.failures,
            availability=1 - (bill["outage"] + bill["stall"] / 3600) / end,
            goodput_lost=(bill["lost"] + bill["stall"] / 3600) / end,
            outage_hours=bill["outage"],
            degraded_hours=bill["degraded"],
            reduced_hours=bill["reduced"],
            stall_seconds=bill["stall"],
            tokens_recomputed=bill["tokens"],
            store_bytes=bill["store"],
            most_dead=self.most_dead,
            stall_low=bill["low"],
            stall_high=bill["high"],
            hours=end,
        )

    def _pass(self, hours: float) -> None:
        """Add `hours` in the present state to the totals."""
        capacity = self._capacity()
        fixed = self.spares / len(self.deployment.plan.ranks)
        if capacity == 0:
            self.bill["outage"] += hours
            self.bill["lost"] += hours
            return
        self.bill["lost"] += hours * max(fixed, 1 - capacity)
        self.bill["reduced"] += hours * (capacity < 1)
        self.bill["degraded"] += hours * bool((self.counts == 0).any())

    def _capacity(self) -> float:
        """The share of full throughput; 0 when the experts do not fit or no attention rank is left."""
        plan = self.deployment.plan
        fits = int(self.alive.sum()) * plan.slots_per_rank >= plan.experts or self.policy == "mask"
        broken = max(0, len(self.broken) - self.spares)
        return (1 - broken / self.groups) if fits and self.alive.any() else 0.0

    def _down(self, ids: tuple[int, ...]) -> None:
        new = [i for i in ids if not self.down.get(i)]
        for i in ids:
            self.down[i] = self.down.get(i, 0) + 1
        if not new:
            return
        self.failures += 1
        self.most_dead = max(self.most_dead, sum(1 for n in self.down.values() if n))
        groups = {self.group_of[i] for i in new if i in self.group_of}
        fresh = [g for g in groups if not self.broken.get(g)]
        for i in new:
            if i in self.group_of:
                group = self.group_of[i]
                self.broken[group] = self.broken.get(group, 0) + 1
        rows = [self.position[i] for i in new if i in self.position]
        fixed = self.recovery.times
        if self.policy == "restart":
            self._vacate(rows)
            self._refill()
            self._stall({"detect": fixed.detect, "restart": fixed.restart})
            self.bill["tokens"] += self.cache_tokens * max(0, self.groups - len(self.broken) + len(fresh))
            return
        self._vacate(rows)
        self.bill["tokens"] += self.cache_tokens * len(fresh)
        weights = 0.0
        if self.policy != "mask":
            weights = self._refill(whole_rank=self.policy == "switch" and bool(rows))
        plan, left = self.deployment.plan, len(self.deployment.plan.ranks) - sum(map(bool, self.down.values()))
        requests = plan.figure("requests_per_group", 0.0) * max(0, self.groups - len(self.broken))
        step = plan.figure("step", 0.0)
        phases = self.recovery.phases(left, weights=weights, requests=requests, ranks_step=step)
        self._stall(phases)

    def _stall(self, phases: Mapping[str, float]) -> None:
        """Add the seconds of the phases of a recovery, and the ends of their range."""
        low, mid, high = self.bands.stall(phases)
        for name, seconds in (("stall", mid), ("low", low), ("high", high)):
            self.bill[name] += seconds

    def _up(self, ids: tuple[int, ...]) -> None:
        back = []
        for i in ids:
            self.down[i] = self.down.get(i, 1) - 1
            if not self.down[i]:
                back.append(i)
        if not back:
            return
        self._return(back)
        restart = self.policy == "restart"
        times = self.recovery.times
        self._stall({"restart": times.restart} if restart else {"rejoin": times.rejoin})
        self.bill["tokens"] += self.cache_tokens * (self.groups - len(self.broken)) * restart

    def _return(self, ids) -> None:
        """Put ranks back into service, with the experts that they had at first."""
        for i in ids:
            group = self.group_of.get(i)
            if group is not None and self.broken.get(group):
                self.broken[group] -= 1
                if not self.broken[group]:
                    del self.broken[group]
            if i in self.position and not self.down.get(i):
                at = self.position[i]
                self.alive[at] = True
                self.table[:, at] = self.original[:, at]
                self._count(at, +1)

    def _vacate(self, rows: list[int]) -> None:
        for at in rows:
            if self.alive[at]:
                self._count(at, -1)
                self.alive[at] = False
                self.table[:, at] = -1

    def _count(self, at: int, sign: int) -> None:
        layer, slot = np.nonzero(self.table[:, at] >= 0)
        np.add.at(self.counts, (layer, self.table[layer, at, slot]), sign)

    def _refill(self, *, whole_rank: bool = False) -> float:
        """Load lost experts into spare slots from the store: seconds until the rank with most to load is done."""
        plan, workload = self.deployment.plan, self.deployment.workload
        hardware = self.deployment.cluster.hardware
        lost = np.argwhere(self.counts == 0)
        if int(self.alive.sum()) * plan.slots_per_rank < plan.experts or not len(lost):
            return 0.0
        fills = np.zeros(len(self.alive), np.int64)
        for layer, expert in lost:
            held = self.table[layer]
            spare = ((held < 0) | (self.counts[layer][held] > 1)) & self.alive[:, None]
            rank, slot = divmod(int(self.rng.choice(np.flatnonzero(spare))), held.shape[1])
            if held[rank, slot] >= 0:
                self.counts[layer, held[rank, slot]] -= 1
            held[rank, slot] = expert
            self.counts[layer, expert] += 1
            fills[rank] += 1
        self.bill["store"] += len(lost) * workload.expert_bytes
        most = plan.slots_per_rank * plan.moe_layers if whole_rank else int(fills.max())
        host = max(most, int(np.bincount(self.host, weights=fills).max()))
        return store_seconds(hardware, *(count * workload.expert_bytes for count in (most, host, len(lost))))
