"""What every loss costs: whether it is survived, by which means, how long streams wait, what is left."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field

import numpy as np

from planner.adoption import adopt
from planner.deployment import Deployment
from planner.parity import KeptGroup
from planner.plan import HOLDS_EXPERTS
from planner.recovery import Recovery, score_kept
from planner.shape import most_slots
from planner.survivors import Outlook, Survivors, survivors
from planner.throughput import Candidate

MEANS = ("copy", "parity", "peer", "redirect", "store", "switch", "spare", "narrow", "regrow", "mask")
REFUSABLE = ("parity", "store", "switch", "spare", "narrow", "regrow")
SERVED = tuple(each for each in MEANS if each != "narrow")
"""What `moejax serve` does: its tensor groups stay as wide as they are."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One loss. Bytes and seconds; `means` counts (layer, expert) pairs or ranks handled each way.

    `phases` are seconds that streams on surviving ranks wait; `moved_stall` is what streams of dead ranks
    wait in all. `capacity` is the part of tokens/s left; `traffic_lost` the share of expert traffic that is
    masked, or would be while experts load; `score` the predicted part of task scores kept while the masked experts are
    missing, from their share of the traffic or of the experts, whichever is more.
    """

    kind: str
    name: str
    dead: tuple[int, ...]
    survivable: bool
    reason: str = ""
    means: dict[str, int] = field(default_factory=dict)
    bytes_moved: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    moved_stall: float = 0.0
    masked: int = 0
    cache_tokens: int = 0
    capacity: float = 0.0
    traffic_lost: float = 0.0
    score: float = 1.0

    @property
    def stall(self) -> float:
        """Seconds that streams on surviving ranks wait."""
        return sum(self.phases.values())

    @property
    def from_memory(self) -> bool:
        """Survived without reading a store: copies, parity and peers were enough."""
        return self.survivable and not any(self.means.get(m) for m in ("store", "switch", "regrow", "mask"))

    def to_dict(self) -> dict:
        """For JSON."""
        return {**asdict(self), "stall": self.stall, "from_memory": self.from_memory}


class Losses:
    """Every loss of one deployment. `means` are those allowed; "mask" is used only when nothing else is. `recomputed`
    is the share of a dead rank's cache that nobody has copied; `kept` are parity groups beside those of the plan."""

    def __init__(
        self,
        deployment: Deployment,
        recovery: Recovery | None = None,
        means: Collection[str] = MEANS,
        *,
        recomputed: float = 1.0,
        kept: Iterable[KeptGroup] = (),
    ) -> None:
        plan = deployment.plan
        self.deployment, self.recovery, self.means = deployment, recovery or Recovery(), frozenset(means)
        self.recomputed = recomputed
        self.outlook = Outlook(deployment)
        self.loads = deployment.load_array()
        self.table = plan.slot_table().reshape(plan.moe_layers, len(plan.holders), plan.slots_per_rank)
        self.copies = plan.copies()
        self.position = {rank: at for at, rank in enumerate(plan.holder_ids)}
        self.groups: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        for g in plan.parity:
            for expert in g.members:
                self.groups[g.layer, expert] = (plan.holder_ids[g.slot // plan.slots_per_rank], g.members)
        for g in kept:
            self.groups |= {(g.layer, expert): (g.keeper, g.members) for expert in g.members}

    def outcome(self, dead: Collection[int], *, kind: str = "rank", name: str = "") -> Outcome:
        """What happens when exactly the ranks `dead` of the plan die at once."""
        dead = tuple(sorted(dead))
        deployment, plan = self.deployment, self.deployment.plan
        head = {"kind": kind, "name": name or ",".join(map(str, dead)), "dead": dead}
        left = survivors(deployment, frozenset(dead), self.outlook, self.means)
        gone = [self.position[r] for r in dead if r in self.position]
        lost, touched = self._lost(gone)
        slots, reason = self._slots(left)
        if reason and ("mask" not in self.means or not (left.data and left.holders)):
            return Outcome(**head, survivable=False, reason=reason, traffic_lost=self._traffic(lost))
        means: dict[str, int] = {"copy": touched - int(lost.sum())} if touched else {}
        rebuilt, missing, parity_bytes = self._parity(lost, dead)
        room = slots * left.holders
        masked = 0 if room >= plan.experts else (plan.experts - room) * plan.moe_layers
        store = int(missing.sum()) - masked
        if masked or (store > 0 and "store" not in self.means):
            masked = masked if "store" in self.means else int(missing.sum())
            store = int(missing.sum()) - masked
            if "mask" not in self.means:
                reason = f"{masked} (layer, expert) pairs have no copy, parity group or store"
                return Outcome(**head, survivable=False, reason=reason, traffic_lost=self._traffic(missing))
        means |= {"parity": rebuilt, "store": max(0, store), "mask": masked}
        means |= {"switch": len(left.switched), "spare": len(left.spares)}
        means |= {"narrow": int(left.tensor < self.outlook.shape.tensor)}
        means |= {"regrow": int(slots > plan.slots_per_rank), "peer": int(left.peer_bytes > 0)}
        means["redirect"] = 0 if left.dense_lost else left.redirected
        load = lost & ~self._masked_of(missing, masked)
        weights, moved = self._weights(load, left, frozenset(dead), parity_bytes)
        fixed = self.recovery
        phases = {"detect": fixed.detect, "abort": fixed.abort, "adopt": fixed.adopt, "weights": weights}
        after = self.outlook.of(left, slots)
        tokens, moved_stall = self._recompute(left, after)
        share = masked / max(1, plan.moe_layers * plan.experts)
        return Outcome(
            **head,
            survivable=after.tokens_per_second > 0 or not self.outlook.whole.tokens_per_second,
            reason=after.reason if not after.tokens_per_second else "",
            means={k: v for k, v in means.items() if v},
            bytes_moved=moved,
            phases=phases,
            moved_stall=sum(phases.values()) + moved_stall,
            masked=masked,
            cache_tokens=tokens,
            capacity=self.outlook.capacity(left, slots),
            traffic_lost=self._traffic(lost),
            score=score_kept(max(share, self._traffic(self._masked_of(missing, masked)))),
        )

    def _lost(self, gone: list[int]) -> tuple[np.ndarray, int]:
        """Pairs without a copy left, bool [layers, experts], and how many pairs the dead ranks held."""
        lost = np.zeros(self.copies.shape, bool)
        if not gone or not lost.size:
            return lost, 0
        layers = len(self.table)
        flat = self.table[:, gone].reshape(layers, -1)
        if flat.shape[1] == 1:
            rows = np.flatnonzero(flat[:, 0] >= 0)
            experts = flat[rows, 0]
            lost[rows, experts] = self.copies[rows, experts] == 1
            return lost, len(rows)
        away = np.zeros((layers, self.copies.shape[1] + 1), np.int32)
        np.add.at(away, (np.arange(layers)[:, None], flat), 1)
        away = away[:, :-1]
        return (away > 0) & (away == self.copies), int((away > 0).sum())

    def _slots(self, left: Survivors) -> tuple[int, str]:
        """Slots per rank afterwards (more when buffers may grow), and why the experts do not fit, if so."""
        plan, workload = self.deployment.plan, self.deployment.workload
        if not left.data:
            return plan.slots_per_rank, "no rank is left that attends"
        if not left.holders:
            return plan.slots_per_rank, "no rank is left that holds experts"
        if left.holders * plan.slots_per_rank >= plan.experts:
            return plan.slots_per_rank, ""
        least = -(-plan.experts // left.holders)
        most = most_slots(workload, self.deployment.cluster)
        if "regrow" in self.means and (most is None or least <= most):
            return least, ""
        have = left.holders * plan.slots_per_rank
        return plan.slots_per_rank, (
            f"{plan.experts} experts do not fit in {have} slots ({left.holders} ranks x {plan.slots_per_rank})"
        )

    def _parity(self, lost: np.ndarray, dead: Collection[int]) -> tuple[int, np.ndarray, int]:
        """Pairs that parity groups rebuild, bool [layers, experts] of those they cannot, and bytes moved."""
        missing = lost.copy()
        if not self.groups or "parity" not in self.means:
            return 0, missing, 0
        rebuilt, moved = 0, 0
        for layer, expert in np.argwhere(lost):
            keeper, members = self.groups.get((int(layer), int(expert)), (-1, ()))
            others = [m for m in members if m != expert]
            if members and keeper not in dead and not lost[layer, others].any():
                missing[layer, expert] = False
                rebuilt += 1
                moved += len(members) * self.deployment.workload.expert_bytes
        return rebuilt, missing, moved

    def _masked_of(self, missing: np.ndarray, masked: int) -> np.ndarray:
        """The coldest `masked` of the missing pairs, bool [layers, experts]."""
        chosen = np.zeros(missing.shape, bool)
        if masked:
            pairs = np.argwhere(missing)
            order = np.argsort(self.loads[pairs[:, 0], pairs[:, 1]], kind="stable")[:masked]
            chosen[pairs[order, 0], pairs[order, 1]] = True
        return chosen

    def _weights(self, lost: np.ndarray, left: Survivors, dead: frozenset[int], parity_bytes: int) -> tuple[float, int]:
        """Seconds until the busiest rank and host have their weights, and bytes loaded by all."""
        plan, workload = self.deployment.plan, self.deployment.workload
        hardware = self.deployment.cluster.hardware
        peers = left.peer_bytes / hardware.link_bandwidth
        if left.dense_lost:
            peers += workload.dense_bytes / left.dense / hardware.host_to_device_bandwidth
        count = int(lost.sum())
        moved = left.peer_bytes * left.peer_ranks + count * workload.expert_bytes + parity_bytes
        if not count:
            return peers, moved
        alive = [r for r in plan.ranks if r.id not in dead]
        holders = [r for r in alive if left.roles.get(r.id, r.role) in HOLDS_EXPERTS]
        fills = self._fills(lost, [self.position.get(r.id, -1) for r in holders])
        by_host: dict[str, int] = {}
        for rank, fill in zip(holders, fills, strict=True):
            by_host[rank.host] = by_host.get(rank.host, 0) + int(fill)
        busiest, host = (
            int(fills.max()) * workload.expert_bytes,
            max(by_host.values()) * workload.expert_bytes,
        )
        store = max(busiest / hardware.host_to_device_bandwidth, host / hardware.store_bandwidth)
        spread = parity_bytes / max(1, len(holders)) / hardware.network_bandwidth
        if left.switched:
            store = max(store, plan.slots_per_rank * workload.slot_bytes / hardware.host_to_device_bandwidth)
        return peers + store + spread, moved

    def _fills(self, lost: np.ndarray, positions: list[int]) -> np.ndarray:
        """Experts each holder loads, int [holders]; `positions` are rows of the table, -1 for new ranks."""
        at = np.array(positions)
        rows = np.where((at >= 0)[None, :, None], self.table[:, np.maximum(at, 0)], -1)
        room = len(at) * rows.shape[2]
        if room < self.deployment.plan.experts:
            return np.full(len(at), -(-int(lost.sum()) // len(at)))
        after = adopt(rows, lost, self.loads)
        return ((after != rows) & (after >= 0)).sum(axis=(0, 2))

    def _recompute(self, left: Survivors, after: Candidate) -> tuple[int, float]:
        """Cache tokens of broken groups, and seconds until the last of their requests streams again."""
        whole, traffic = self.outlook.whole, self.deployment.traffic
        requests = left.broken_groups * whole.requests_per_group
        rounds = -(-requests // max(1, left.data)) * self.recomputed
        return int(requests * traffic.context * self.recomputed), rounds * (after.ttft_seconds or whole.ttft_seconds)

    def _traffic(self, lost: np.ndarray) -> float:
        return float((self.loads * lost).sum() / max(1, len(self.loads)))
