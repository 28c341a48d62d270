"""The cost of a loss: whether it is survivable, by which means, how long streams wait, and the capacity left."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from planner.cost.front import FrontCost
from planner.cost.recovery_model import RecoveryModel, store_seconds
from planner.cost.remaining_score import remaining_score
from planner.cost.throughput import Candidate
from planner.failures.held_experts import HeldExperts
from planner.failures.survivors import CapacityModel, Survivors, survivors
from planner.inputs.recovery_times import RecoveryTimes
from planner.plan.deployment import Deployment
from planner.plan.plan import EXPERT_ROLES
from planner.solver.parity_groups import HostParityGroup
from planner.solver.shapes import most_slots

MEANS = ("copy", "parity", "peer", "redirect", "store", "switch", "spare", "narrow", "regrow", "mask")
OPTIONAL_MEANS = ("parity", "store", "switch", "spare", "narrow", "regrow")
SERVED_MEANS = tuple(each for each in MEANS if each != "narrow")
"""The means of `moejax serve`, whose tensor groups keep their width."""


@dataclass(frozen=True, kw_only=True)
class LossOutcome:
    """The predicted outcome of one loss, in bytes and seconds.

    `means` counts the (layer, expert) pairs or ranks handled by each of MEANS. `phases` are seconds that streams on
    surviving ranks wait, `moved_stall` the seconds that streams of dead ranks wait in all. `capacity` is the share of
    tokens/s left, `traffic_lost` the share of expert traffic that is masked, or would be while experts load. `score` is
    the predicted share of task scores left while the masked experts are missing (`remaining_score` of their share of
    the traffic or of the experts, whichever is more).
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
        """True when the loss is survived without a read from the store: copies, parity and peers are enough."""
        return self.survivable and not any(self.means.get(m) for m in ("store", "switch", "regrow", "mask"))

    def to_dict(self) -> dict:
        """The outcome for JSON."""
        return {**asdict(self), "stall": self.stall, "from_memory": self.from_memory}


class LossModel:
    """Predicts the outcome of any loss of one deployment.

    `recovery` are the fixed phases: the given ones, or else those of the deployment's own server, or else estimates.
    `means` are the means allowed; "mask" is the last resort. `recomputed` is the share of a dead rank's KV cache that
    has no replica. `host_groups` are parity groups in host memory, beside those in slots of the plan. Without
    `one_front` the front's work is left out.
    """

    def __init__(
        self,
        deployment: Deployment,
        recovery: RecoveryTimes | None = None,
        means: Collection[str] = MEANS,
        *,
        recomputed: float = 1.0,
        one_front: bool = True,
        host_groups: Iterable[HostParityGroup] = (),
    ) -> None:
        plan = deployment.plan
        self.deployment, self.means = deployment, frozenset(means)
        self.recovery = RecoveryModel.of(deployment.workload, recovery or deployment.recovery)
        if not one_front:
            self.recovery = replace(self.recovery, front=FrontCost())
        self.recomputed = recomputed
        self.capacity_model = CapacityModel(deployment)
        self.loads = deployment.load_array()
        self.placed = self.held = HeldExperts.of(plan)
        self.groups: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        for g in plan.parity:
            for expert in g.members:
                self.groups[g.layer, expert] = (plan.expert_rank_ids[g.slot // plan.slots_per_rank], g.members)
        for g in host_groups:
            self.groups |= {(g.layer, expert): (g.rank, g.members) for expert in g.members}

    def holding(self, held: HeldExperts) -> LossModel:
        """The same model while ranks hold these experts, as after an earlier loss."""
        other = copy(self)
        other.held = held
        return other

    def left(self, dead: Collection[int]) -> Survivors:
        """The ranks left without `dead`, by the means allowed."""
        return survivors(self.deployment, frozenset(dead), self.capacity_model, self.means)

    def outcome(
        self, dead: Collection[int], *, kind: str = "rank", name: str = "", since: Survivors | None = None
    ) -> LossOutcome:
        """The outcome when exactly the ranks `dead` of the plan die at once; with `since`, the ranks left of an earlier
        loss of some of them, when the others die."""
        dead = tuple(sorted(dead))
        plan = self.deployment.plan
        head = {"kind": kind, "name": name or ",".join(map(str, dead)), "dead": dead}
        left = self.left(dead)
        new = left if since is None else left.since(since)
        lost, touched = self.held.lost(dead)
        slots, reason = self.slots_after(left)
        if reason and ("mask" not in self.means or not (left.data and left.expert_rank_count)):
            return LossOutcome(**head, survivable=False, reason=reason, traffic_lost=self._traffic(lost))
        means: dict[str, int] = {"copy": touched - int(lost.sum())} if touched else {}
        rebuilt, missing, parity_bytes = self._parity(lost, dead)
        room = slots * left.expert_rank_count
        masked = 0 if room >= plan.experts else (plan.experts - room) * plan.moe_layers
        store = int(missing.sum()) - masked
        if masked or (store > 0 and "store" not in self.means):
            masked = masked if "store" in self.means else int(missing.sum())
            store = int(missing.sum()) - masked
            if "mask" not in self.means:
                reason = f"{masked} (layer, expert) pairs have no copy, parity group or store"
                return LossOutcome(**head, survivable=False, reason=reason, traffic_lost=self._traffic(missing))
        means |= {"parity": rebuilt, "store": max(0, store), "mask": masked}
        means |= {"switch": len(new.switched), "spare": len(new.spares)}
        means |= {"narrow": int(left.tensor < self.capacity_model.shape.tensor)}
        means |= {"regrow": int(slots > plan.slots_per_rank), "peer": int(new.peer_bytes > 0)}
        means["redirect"] = 0 if left.dense_lost else new.redirected
        load = lost & ~self._masked_of(missing, masked)
        weights, moved = self._weights(load, new, dead, slots, parity_bytes)
        after = self.capacity_model.predict(left, slots)
        phases = self.phases(left, after, weights)
        tokens, moved_stall = self.recompute(new, after)
        share = masked / max(1, plan.moe_layers * plan.experts)
        return LossOutcome(
            **head,
            survivable=after.tokens_per_second > 0 or not self.capacity_model.whole.tokens_per_second,
            reason=after.reason if not after.tokens_per_second else "",
            means={k: v for k, v in means.items() if v},
            bytes_moved=moved,
            phases=phases,
            moved_stall=sum(phases.values()) + moved_stall,
            masked=masked,
            cache_tokens=tokens,
            capacity=self.capacity_model.capacity(left, slots),
            traffic_lost=self._traffic(lost),
            score=remaining_score(max(share, self._traffic(self._masked_of(missing, masked)))),
        )

    def lost_pairs(self, dead: Collection[int]) -> int:
        """The number of (layer, expert) pairs whose last copy a loss takes."""
        return int(self.held.lost(dead)[0].sum())

    def expert_ranks(self, left: Survivors, dead: Collection[int]) -> list[int]:
        """The ids of the ranks left that hold experts, in the order of the plan."""
        gone, roles = frozenset(dead), left.roles
        return [
            r.id for r in self.deployment.plan.ranks if r.id not in gone and roles.get(r.id, r.role) in EXPERT_ROLES
        ]

    def after(self, dead: Collection[int], left: Survivors) -> HeldExperts:
        """The experts that the ranks left hold once the lost ones that are not masked are loaded. Where the experts do
        not fit, or may not be loaded, the ranks hold what they held."""
        slots, reason = self.slots_after(left)
        held = self.held.on(self.expert_ranks(left, dead), slots)
        if reason:
            return held
        missing = held.missing(self.placed)
        if "store" not in self.means:
            missing &= ~self._parity(missing, dead)[1]
        return held.filled(missing, self.loads)

    def phases(self, left: Survivors, after: Candidate, weights: float) -> dict[str, float]:
        """Seconds of each phase of the recovery; `after` is the prediction for the ranks left."""
        requests = self.capacity_model.whole.requests_per_group * left.data
        ranks_step = after.step.total if after.step else 0.0
        return self.recovery.phases(left.ranks, weights=weights, requests=requests, ranks_step=ranks_step)

    def slots_after(self, left: Survivors) -> tuple[int, str]:
        """Slots per rank afterwards (more when buffers may grow), and the reason when the experts do not fit."""
        plan, workload = self.deployment.plan, self.deployment.workload
        if not left.data:
            return plan.slots_per_rank, "no rank is left that attends"
        if not left.expert_rank_count:
            return plan.slots_per_rank, "no rank is left that holds experts"
        if left.expert_rank_count * plan.slots_per_rank >= plan.experts:
            return plan.slots_per_rank, ""
        least = -(-plan.experts // left.expert_rank_count)
        most = most_slots(workload, self.deployment.cluster)
        if "regrow" in self.means and (most is None or least <= most):
            return least, ""
        ranks = left.expert_rank_count
        return plan.slots_per_rank, (
            f"{plan.experts} experts do not fit in {ranks * plan.slots_per_rank} slots "
            f"({ranks} ranks x {plan.slots_per_rank})"
        )

    def _parity(self, lost: np.ndarray, dead: Collection[int]) -> tuple[int, np.ndarray, int]:
        """The number of pairs that parity groups rebuild, bool [layers, experts] of the others, and bytes moved."""
        missing = lost.copy()
        if not self.groups or "parity" not in self.means:
            return 0, missing, 0
        rebuilt, moved = 0, 0
        for layer, expert in np.argwhere(lost):
            rank, members = self.groups.get((int(layer), int(expert)), (-1, ()))
            others = [m for m in members if m != expert]
            if members and rank not in dead and not lost[layer, others].any():
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

    def _weights(
        self, lost: np.ndarray, left: Survivors, dead: Collection[int], slots: int, parity_bytes: int
    ) -> tuple[float, int]:
        """Seconds until the rank and the host with most to load have their weights, and the bytes loaded by all."""
        plan, workload = self.deployment.plan, self.deployment.workload
        hardware = self.deployment.cluster.hardware
        peers = left.peer_bytes / hardware.link_bandwidth
        if left.dense_lost:
            peers += workload.dense_bytes / left.dense / hardware.host_to_device_bandwidth
        count = int(lost.sum())
        moved = left.peer_bytes * left.peer_ranks + count * workload.expert_bytes + parity_bytes
        if not count:
            return peers, moved
        ranks = self.expert_ranks(left, dead)
        fills = self._fills(lost, ranks, slots)
        by_host: dict[str, int] = {}
        for rank, fill in zip(ranks, fills, strict=True):
            host = self.capacity_model.place[rank].host
            by_host[host] = by_host.get(host, 0) + int(fill)
        busiest, host = (
            int(fills.max()) * workload.expert_bytes,
            max(by_host.values()) * workload.expert_bytes,
        )
        store = store_seconds(hardware, busiest, host, count * workload.expert_bytes)
        spread = parity_bytes / max(1, len(ranks)) / hardware.network_bandwidth
        if left.switched:
            store = max(store, plan.slots_per_rank * workload.slot_bytes / hardware.host_to_device_bandwidth)
        return peers + store + spread, moved

    def weights_at_most(self, left: Survivors, lost: int, dead: int) -> float:
        """Seconds that loading weights takes at most for any loss of `dead` ranks that leaves `left` and takes the last
        copy of at most `lost` (layer, expert) pairs.

        Each term of the seconds of such a loss is at most the one here: a rank loads no more than all lost pairs, nor
        more than it has slots (where no buffer grows); a host no more than its ranks; parity groups no more than the
        largest group for each pair; dense layers are lost only where ranks that died or changed their role are as many
        as there are dense groups.
        """
        plan, workload = self.deployment.plan, self.deployment.workload
        hardware = self.deployment.cluster.hardware
        seconds = left.peer_bytes / hardware.link_bandwidth
        groups = len(set(self.capacity_model.dense_group.values()))
        if 0 < groups <= dead + len(left.switched):
            seconds += workload.dense_bytes / left.dense / hardware.host_to_device_bandwidth
        if not lost:
            return seconds
        slots = plan.slots_per_rank * plan.moe_layers
        grown = left.expert_rank_count * plan.slots_per_rank < plan.experts
        rank = lost if grown else min(lost, slots)
        host = min(lost, rank * self.deployment.cluster.per_host)
        store = store_seconds(hardware, *(count * workload.expert_bytes for count in (rank, host, lost)))
        if left.switched:
            store = max(store, plan.slots_per_rank * workload.slot_bytes / hardware.host_to_device_bandwidth)
        members = max((len(members) for _, members in self.groups.values()), default=0)
        parity = lost * members * workload.expert_bytes / max(1, left.expert_rank_count)
        return seconds + store + parity / hardware.network_bandwidth

    def _fills(self, lost: np.ndarray, ranks: Sequence[int], slots: int) -> np.ndarray:
        """The experts that each of the ranks left loads, int [ranks]; evenly where they have too few slots for all."""
        if len(ranks) * slots < self.deployment.plan.experts:
            each, more = divmod(int(lost.sum()), len(ranks))
            return each + (np.arange(len(ranks)) < more)
        held = self.held.on(ranks, slots)
        return held.filled(lost, self.loads).loaded_since(held)

    def recompute(self, left: Survivors, after: Candidate) -> tuple[int, float]:
        """Cache tokens of broken groups to recompute, and seconds until the last of their requests streams again. In a
        pool for prompts, a step computes several of each group."""
        whole, traffic = self.capacity_model.whole, self.deployment.traffic
        requests = left.broken_groups * whole.requests_per_group
        at_once = max(1, after.requests_per_group) if self.deployment.work == "prompts" else 1
        rounds = -(-requests // max(1, left.data * at_once)) * self.recomputed
        return int(requests * traffic.context * self.recomputed), rounds * (after.ttft_seconds or whole.ttft_seconds)

    def _traffic(self, lost: np.ndarray) -> float:
        """The share of all expert traffic that the pairs `lost` take, bool [layers, experts]."""
        return float((self.loads * lost).sum() / max(1, len(self.loads)))
