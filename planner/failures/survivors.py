"""The mesh left after a loss (broken tensor groups, spares, role switches) and the capacity it has."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from math import ceil, inf

from planner.cost.mixed import assess_kinds, seconds_of_requests
from planner.cost.throughput import Candidate
from planner.plan.deployment import Deployment, shape_of
from planner.plan.plan import ATTENTION_ROLES, EXPERT_ROLES, PlannedRank
from planner.plan.shape import Shape
from planner.solver.roles import roles_after
from planner.solver.shapes import rest_bytes


@dataclass(frozen=True, kw_only=True)
class Survivors:
    """The mesh left after a loss: the numbers of ranks, of tensor groups (`data`) and of expert ranks.

    `roles` are the new roles of ranks whose role changes; `switched` of them changed from attention to experts,
    `spares` were standby ranks. `peer_ranks` ranks, all with attention, each load `peer_bytes` of attention and dense
    weights from peers. Tokens of `redirected` dense groups that lost a shard go to complete groups, unless there is
    none (`dense_lost`).
    """

    ranks: int
    data: int
    expert_rank_count: int
    tensor: int
    dense: int
    broken_groups: int = 0
    roles: dict[int, str] = field(default_factory=dict)
    switched: tuple[int, ...] = ()
    spares: tuple[int, ...] = ()
    peer_bytes: int = 0
    peer_ranks: int = 0
    redirected: int = 0
    dense_lost: bool = False

    def since(self, before: Survivors) -> Survivors:
        """These ranks with what is new since `before`, the ranks left of an earlier loss: groups broken, roles switched
        and weights loaded from peers."""
        same = (self.tensor, self.peer_ranks, self.peer_bytes) == (before.tensor, before.peer_ranks, before.peer_bytes)
        peers = self.peer_ranks if self.tensor != before.tensor else self.peer_ranks - before.peer_ranks
        return replace(
            self,
            broken_groups=max(0, self.broken_groups - before.broken_groups),
            redirected=max(0, self.redirected - before.redirected),
            dense_lost=self.dense_lost and not before.dense_lost,
            switched=tuple(rank for rank in self.switched if rank not in before.switched),
            spares=tuple(rank for rank in self.spares if rank not in before.spares),
            peer_bytes=0 if same else self.peer_bytes,
            peer_ranks=max(0, peers),
        )


class CapacityModel:
    """Predicts the throughput of the ranks left of one deployment; caches the predictions of shapes."""

    def __init__(self, deployment: Deployment) -> None:
        plan = deployment.plan
        self.deployment = deployment
        self.shape = shape_of(plan)
        self.standby = [r.id for r in plan.ranks if r.role == "standby"]
        self.place = {r.id: r for r in plan.ranks}
        self.members: dict[int, list[PlannedRank]] = {}
        for r in plan.ranks:
            if r.group >= 0:
                self.members.setdefault(r.group, []).append(r)
        self.expert_rank_count = len(plan.expert_ranks)
        self.idle = [r for r in plan.ranks if r.group < 0 and r.role == "expert" and self.shape.arch != "disaggregated"]
        self.dense_group = _dense_groups(plan.ranks, self.shape.tensor, self.shape.dense)
        self.dense_group_count = len(set(self.dense_group.values()))
        self._peak = plan.figure("peak_load", 1.0)
        self._predictions: dict[tuple, Candidate] = {}
        self._token_seconds: dict[tuple, float] = {}
        self.whole = self._assess(self.shape)

    def _assess(self, shape: Shape) -> Candidate:
        d = self.deployment
        return assess_kinds(d.workload, d.cluster, shape, d.traffic, peak=self._peak, work=d.work)

    def predict(self, left: Survivors, slots: int) -> Candidate:
        """The prediction for `left` with `slots` slots a rank."""
        key = _mesh(left, slots)
        if key not in self._predictions:
            self._predictions[key] = self._assess(self._shape_of(left, slots))
        return self._predictions[key]

    def _shape_of(self, left: Survivors, slots: int) -> Shape:
        """The mesh of `left` as a shape."""
        if left.ranks == len(self.place):
            return replace(self.shape, slots=slots)
        idle = ["standby"] * max(0, left.ranks - left.expert_rank_count)
        groups = [g for g in range(left.data) for _ in range(left.tensor)]
        return replace(
            self.shape,
            tensor=left.tensor,
            dense=left.dense,
            slots=slots,
            roles=(*["expert"] * left.expert_rank_count, *idle),
            groups=tuple(groups),
        )

    def token_seconds(self, left: Survivors, slots: int, requests: int) -> float:
        """Seconds between two tokens of a stream while `left` runs `requests` requests, with prefills of new ones.

        Infinite when the ranks left have no room for the cache of so many.
        """
        key = (*_mesh(left, slots), requests)
        if key not in self._token_seconds:
            self._token_seconds[key] = self._assess_requests(self._shape_of(left, slots), requests)
        return self._token_seconds[key]

    def _assess_requests(self, shape: Shape, requests: int) -> float:
        d = self.deployment
        if not shape.data or not shape.expert_rank_count:
            return inf
        return seconds_of_requests(d.workload, d.cluster, shape, d.traffic, requests, peak=self._peak, work=d.work)

    def capacity(self, left: Survivors, slots: int) -> float:
        """The share of the whole deployment's tokens per second that `left` has; 0 when it cannot serve."""
        whole = self.whole.tokens_per_second
        if not left.data or not left.expert_rank_count:
            return 0.0
        return self.predict(left, slots).tokens_per_second / whole if whole else 1.0


def _mesh(left: Survivors, slots: int) -> tuple[int, ...]:
    """The numbers that the prediction for ranks left depends on."""
    return left.ranks, left.data, left.expert_rank_count, left.tensor, left.dense, slots


def _dense_groups(ranks: Collection[PlannedRank], tensor: int, dense: int) -> dict[int, int]:
    """The dense FFN group of each attention rank, where dense groups are wider than tensor groups."""
    if dense <= tensor:
        return {}
    hosts: dict[str, list[int]] = {}
    for r in ranks:
        if r.group >= 0:
            hosts.setdefault(r.host, []).append(r.id)
    groups = [ids[i : i + dense] for ids in hosts.values() for i in range(0, len(ids), dense)]
    return {rank: number for number, ids in enumerate(groups) for rank in ids}


def survivors(
    deployment: Deployment,
    dead: Collection[int],
    capacity_model: CapacityModel,
    means: Collection[str] = ("spare", "switch", "narrow"),
) -> Survivors:
    """The ranks left of a plan after the loss of `dead` (ids), regrouped for the highest predicted throughput.

    `means` are the means allowed. Standby ranks take the roles of dead ones ("spare"). Where a tensor group broke, its
    other ranks hold experts only, or all groups become half as wide ("narrow"). Attention ranks become expert ranks
    when there are too few slots ("switch").
    """
    plan = deployment.plan
    if capacity_model.shape.arch == "disaggregated" and capacity_model.shape.tensor == 1 and not capacity_model.standby:
        return _by_roles(capacity_model, dead, switch="switch" in means)
    options = list(_regroupings(capacity_model, dead, narrow="narrow" in means))
    if "spare" in means:
        options = [_with_spares(capacity_model, left, dead) for left in options]
    best = options[0]
    if len(options) > 1:
        best = max(options, key=lambda left: capacity_model.capacity(left, plan.slots_per_rank))
    return (
        _with_switched_roles(capacity_model, best, dead, plan.slots_per_rank, plan.experts)
        if "switch" in means
        else best
    )


def _by_roles(capacity_model: CapacityModel, dead: Collection[int], *, switch: bool) -> Survivors:
    """The ranks left of a disaggregated plan without tensor groups, with the roles of `planner.solver.roles`."""
    plan, shape = capacity_model.deployment.plan, capacity_model.shape
    before = {r.id: r.role for r in plan.ranks}
    alive = [rank for rank in plan.rank_ids if rank not in dead]
    after = {rank: before[rank] for rank in alive}
    if switch and alive:
        after = roles_after(alive, before, experts=plan.experts, slots=plan.slots_per_rank)
    changed = {rank: role for rank, role in after.items() if role != before[rank]}
    left = [rank for rank in dead if before[rank] == "attention"]
    invalidated = [rank for rank in changed if before[rank] == "attention"]
    begin = [rank for rank, role in changed.items() if role in ATTENTION_ROLES and before[rank] == "expert"]
    dense_broken = {capacity_model.dense_group[i] for i in (*left, *invalidated) if i in capacity_model.dense_group}
    return Survivors(
        ranks=len(alive),
        data=sum(role in ATTENTION_ROLES for role in after.values()),
        expert_rank_count=sum(role in EXPERT_ROLES for role in after.values()),
        tensor=shape.tensor,
        dense=shape.dense,
        broken_groups=len(left) + len(invalidated),
        roles=changed,
        switched=tuple(changed),
        peer_bytes=rest_bytes(capacity_model.deployment.workload, shape.tensor, shape.dense) if begin else 0,
        peer_ranks=len(begin),
        redirected=len(dense_broken),
        dense_lost=len(dense_broken) == capacity_model.dense_group_count > 0,
    )


def _regroupings(capacity_model: CapacityModel, dead: Collection[int], *, narrow: bool) -> Iterator[Survivors]:
    """The ways to regroup broken tensor groups: as wide as before, then half as wide if `narrow` is allowed."""
    workload, shape = capacity_model.deployment.workload, capacity_model.shape
    gone = [capacity_model.place[i] for i in dead]
    broken = {r.group for r in gone if r.group >= 0}
    left = [r for g in sorted(broken) for r in capacity_model.members[g] if r.id not in dead]
    idle = [r for r in capacity_model.idle if r.id not in dead]
    expert_rank_count = capacity_model.expert_rank_count - sum(r.role in EXPERT_ROLES for r in gone)
    ranks = len(capacity_model.place) - len(gone)
    dense_broken = {capacity_model.dense_group[i] for i in dead if i in capacity_model.dense_group}
    hosts: dict[str, list[PlannedRank]] = {}
    for r in (*left, *idle):
        hosts.setdefault(r.host, []).append(r)
    for tensor in (t for t in (shape.tensor, *[shape.tensor // 2] * narrow) if t >= 1):
        again, alone = 0, []
        for members in hosts.values():
            again += len(members) // tensor
            alone += members[len(members) // tensor * tensor :]
        dense = tensor * max(1, shape.dense // shape.tensor)
        weights = rest_bytes(workload, tensor, dense)
        more = weights - rest_bytes(workload, shape.tensor, shape.dense)
        roles = {r.id: "expert" for r in alone if r.group >= 0}
        data = (shape.data - len(broken)) * (shape.tensor // tensor) + again
        yield Survivors(
            ranks=ranks,
            data=data,
            expert_rank_count=expert_rank_count + sum(r.role == "attention" for r in alone),
            tensor=tensor,
            dense=dense,
            broken_groups=len(broken),
            redirected=len(dense_broken) if tensor == shape.tensor else 0,
            dense_lost=len(dense_broken) == capacity_model.dense_group_count > 0,
            roles=roles,
            peer_bytes=more if more > 0 else weights if again else 0,
            peer_ranks=(data if more > 0 else again) * tensor,
        )
        if not left:
            return


def _with_spares(capacity_model: CapacityModel, left: Survivors, dead: Collection[int]) -> Survivors:
    """`left` with standby ranks in the roles of dead ones; they take attention only without tensor groups."""
    lost = [capacity_model.place[i].role for i in sorted(dead) if capacity_model.place[i].role != "standby"]
    free = [i for i in capacity_model.standby if i not in dead]
    role = dict(zip(free, lost, strict=False))
    if not role:
        return left
    attends = [i for i, r in role.items() if r != "expert" and left.tensor == 1]
    role = {i: r if i in attends else "expert" for i, r in role.items()}
    weights = rest_bytes(capacity_model.deployment.workload, left.tensor, left.dense) if attends else 0
    return replace(
        left,
        data=left.data + len(attends),
        expert_rank_count=left.expert_rank_count + sum(r in EXPERT_ROLES for r in role.values()),
        roles={**left.roles, **role},
        spares=tuple(role),
        peer_bytes=max(left.peer_bytes, weights),
        peer_ranks=left.peer_ranks + len(attends),
    )


def _with_switched_roles(
    capacity_model: CapacityModel, left: Survivors, dead: Collection[int], slots: int, experts: int
) -> Survivors:
    """`left` with attention ranks turned into expert ranks, by tensor group from the last, until all experts fit."""
    missing = ceil(experts / slots) - left.expert_rank_count if slots else 0
    if missing <= 0:
        return left
    chosen: list[int] = []
    groups = 0
    for group in sorted(capacity_model.members, reverse=True):
        members = capacity_model.members[group]
        whole = all(r.role == "attention" and r.id not in dead for r in members)
        if whole and len(chosen) < missing and left.data - groups > 1:
            chosen += [r.id for r in members]
            groups += 1
    return replace(
        left,
        data=left.data - groups,
        expert_rank_count=left.expert_rank_count + len(chosen),
        roles={**left.roles, **dict.fromkeys(chosen, "expert")},
        switched=tuple(chosen),
    )
