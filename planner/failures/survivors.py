"""The mesh left after a loss: broken tensor groups, spares, role switches, and how much it still serves."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from math import ceil

from planner.deployment import Deployment, shape_of
from planner.plan import HOLDS_EXPERTS, SENDS_TOKENS, RankPlace
from planner.roles import roles_after
from planner.shape import Shape, rest_bytes
from planner.throughput import Candidate, assess


@dataclass(frozen=True, kw_only=True)
class Survivors:
    """What is left, in numbers: ranks, tensor groups (`data`), ranks that hold experts.

    `roles` are the ids whose role changed. `switched` of them turned from attention to experts, `spares`
    stood by. `peer_ranks` ranks each load `peer_bytes` of attention and dense weights from their peers.
    Tokens of `redirected` dense groups that lost a shard go to whole ones, unless none is (`dense_lost`).
    """

    ranks: int
    data: int
    holders: int
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


class Outlook:
    """Predicted throughput of what is left of one deployment; remembers the shapes it has seen."""

    def __init__(self, deployment: Deployment) -> None:
        plan = deployment.plan
        self.deployment = deployment
        self.shape = shape_of(plan)
        self.standby = [r.id for r in plan.ranks if r.role == "standby"]
        self.place = {r.id: r for r in plan.ranks}
        self.members: dict[int, list[RankPlace]] = {}
        for r in plan.ranks:
            if r.group >= 0:
                self.members.setdefault(r.group, []).append(r)
        self.holders = len(plan.holders)
        self.dense_group = _dense_groups(plan.ranks, self.shape.tensor, self.shape.dense)
        self._peak = next((f.value for f in plan.cost if f.name == "peak_load"), 1.0)
        self._seen: dict[tuple, Candidate] = {}
        self.whole = self._assess(self.shape)

    def _assess(self, shape: Shape) -> Candidate:
        d = self.deployment
        return assess(d.workload, d.cluster, shape, d.traffic, peak=self._peak)

    def of(self, left: Survivors, slots: int) -> Candidate:
        """The prediction for `left` with `slots` slots a rank."""
        key = (left.ranks, left.data, left.holders, left.tensor, left.dense, slots)
        if key not in self._seen:
            idle = ["standby"] * max(0, left.ranks - left.holders)
            groups = [g for g in range(left.data) for _ in range(left.tensor)]
            shape = replace(
                self.shape,
                tensor=left.tensor,
                dense=left.dense,
                slots=slots,
                roles=(*["expert"] * left.holders, *idle),
                groups=tuple(groups),
            )
            self._seen[key] = self._assess(shape)
        return self._seen[key]

    def capacity(self, left: Survivors, slots: int) -> float:
        """Tokens per second of `left` as a part of the whole deployment's; 0 when it cannot serve."""
        whole = self.whole.tokens_per_second
        if not left.data or not left.holders:
            return 0.0
        return self.of(left, slots).tokens_per_second / whole if whole else 1.0


def _dense_groups(ranks: Collection[RankPlace], tensor: int, dense: int) -> dict[int, int]:
    """Dense FFN group of each attending rank, where those are wider than tensor groups."""
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
    outlook: Outlook,
    means: Collection[str] = ("spare", "switch", "narrow"),
) -> Survivors:
    """The ranks left of a plan after `dead` (ids), regrouped the way that is predicted to serve most.

    `means` are those allowed. Standby ranks take the roles of dead ones. Where a tensor group broke, its other ranks
    hold experts only, or all groups become half as wide ("narrow"). Attention ranks switch to experts when slots would
    run short.
    """
    plan = deployment.plan
    if outlook.shape.arch == "disaggregated" and outlook.shape.tensor == 1 and not outlook.standby:
        return _by_roles(outlook, dead, switch="switch" in means)
    options = list(_regrouped(outlook, dead, narrow="narrow" in means))
    if "spare" in means:
        options = [_promoted(outlook, left, dead) for left in options]
    best = options[0]
    if len(options) > 1:
        best = max(options, key=lambda left: outlook.capacity(left, plan.slots_per_rank))
    return _switched(outlook, best, dead, plan.slots_per_rank, plan.experts) if "switch" in means else best


def _by_roles(outlook: Outlook, dead: Collection[int], *, switch: bool) -> Survivors:
    """What is left of attention ranks that attend alone and of expert ranks, with the roles of `planner.roles`."""
    plan, shape = outlook.deployment.plan, outlook.shape
    before = {r.id: r.role for r in plan.ranks}
    alive = [rank for rank in plan.rank_ids if rank not in dead]
    after = {rank: before[rank] for rank in alive}
    if switch and alive:
        after = roles_after(alive, before, experts=plan.experts, slots=plan.slots_per_rank)
    changed = {rank: role for rank, role in after.items() if role != before[rank]}
    left = [rank for rank in dead if before[rank] == "attention"]
    emptied = [rank for rank in changed if before[rank] == "attention"]
    begin = [rank for rank, role in changed.items() if role in SENDS_TOKENS and before[rank] == "expert"]
    dense_broken = {outlook.dense_group[i] for i in (*left, *emptied) if i in outlook.dense_group}
    return Survivors(
        ranks=len(alive),
        data=sum(role in SENDS_TOKENS for role in after.values()),
        holders=sum(role in HOLDS_EXPERTS for role in after.values()),
        tensor=shape.tensor,
        dense=shape.dense,
        broken_groups=len(left) + len(emptied),
        roles=changed,
        switched=tuple(changed),
        peer_bytes=rest_bytes(outlook.deployment.workload, shape.tensor, shape.dense) if begin else 0,
        peer_ranks=len(begin),
        redirected=len(dense_broken),
        dense_lost=len(dense_broken) == len(set(outlook.dense_group.values())) > 0,
    )


def _regrouped(outlook: Outlook, dead: Collection[int], *, narrow: bool) -> Iterator[Survivors]:
    """Ways to go on with the tensor groups that broke: as wide as before, then half as wide if they may be `narrow`."""
    workload, shape = outlook.deployment.workload, outlook.shape
    gone = [outlook.place[i] for i in dead]
    broken = {r.group for r in gone if r.group >= 0}
    left = [r for g in sorted(broken) for r in outlook.members[g] if r.id not in dead]
    apart = shape.arch == "disaggregated"
    idle = [r for r in outlook.place.values() if r.group < 0 and r.role == "expert" and r.id not in dead and not apart]
    holders = outlook.holders - sum(r.role in HOLDS_EXPERTS for r in gone)
    ranks = len(outlook.place) - len(gone)
    dense_broken = {outlook.dense_group[i] for i in dead if i in outlook.dense_group}
    hosts: dict[str, list[RankPlace]] = {}
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
        yield Survivors(
            ranks=ranks,
            data=(shape.data - len(broken)) * (shape.tensor // tensor) + again,
            holders=holders + sum(r.role == "attention" for r in alone),
            tensor=tensor,
            dense=dense,
            broken_groups=len(broken),
            redirected=len(dense_broken) if tensor == shape.tensor else 0,
            dense_lost=len(dense_broken) == len(set(outlook.dense_group.values())) > 0,
            roles=roles,
            peer_bytes=more if more > 0 else weights if again else 0,
            peer_ranks=ranks if more > 0 else again * tensor,
        )
        if not left:
            return


def _promoted(outlook: Outlook, left: Survivors, dead: Collection[int]) -> Survivors:
    """Standby ranks in the roles of dead ones; they attend only where groups have one rank."""
    lost = [outlook.place[i].role for i in sorted(dead) if outlook.place[i].role != "standby"]
    free = [i for i in outlook.standby if i not in dead]
    role = dict(zip(free, lost, strict=False))
    if not role:
        return left
    attends = [i for i, r in role.items() if r != "expert" and left.tensor == 1]
    role = {i: r if i in attends else "expert" for i, r in role.items()}
    weights = rest_bytes(outlook.deployment.workload, left.tensor, left.dense)
    return replace(
        left,
        data=left.data + len(attends),
        holders=left.holders + sum(r in HOLDS_EXPERTS for r in role.values()),
        roles={**left.roles, **role},
        spares=tuple(role),
        peer_bytes=max(left.peer_bytes, weights),
        peer_ranks=left.peer_ranks + len(role),
    )


def _switched(outlook: Outlook, left: Survivors, dead: Collection[int], slots: int, experts: int) -> Survivors:
    """Attention ranks turned into expert ranks, whole tensor groups from the last, until all experts fit."""
    missing = ceil(experts / slots) - left.holders if slots else 0
    if missing <= 0:
        return left
    chosen: list[int] = []
    groups = 0
    for group in sorted(outlook.members, reverse=True):
        members = outlook.members[group]
        whole = all(r.role == "attention" and r.id not in dead for r in members)
        if whole and len(chosen) < missing and left.data - groups > 1:
            chosen += [r.id for r in members]
            groups += 1
    return replace(
        left,
        data=left.data - groups,
        holders=left.holders + len(chosen),
        roles={**left.roles, **dict.fromkeys(chosen, "expert")},
        switched=tuple(chosen),
    )
