"""Problem to plan: who is alive, who holds what, with as little movement as possible."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from planner.adoption import adopt, fill_new
from planner.balance import peak, slot_loads, swap_down
from planner.cluster import Cluster
from planner.errors import InputError, NoFeasiblePlan
from planner.groups import tensor_groups
from planner.parity import form_groups, parity_slots
from planner.placement import place
from planner.plan import HOLDS_EXPERTS, SENDS_TOKENS, ParityGroup, Plan, RankPlace, as_tuples
from planner.roles import roles_after
from planner.shape import cache_pages
from planner.shape import slots_per_rank as choose_slots
from planner.workload import Workload

PROTECTION = ("copies", "parity", "none")
TRIES_WORK = 2e6  # layers x copies squared that placements in several orders may cost
NOISE = (0.0, 0.2, 0.6, 0.1)  # how far orders depart from heaviest first, in turn
EVEN = 1.0002  # over the mean, or over the busiest copy alone: cool enough to stop
PATIENCE = 12  # orders tried in vain before giving up


def solve(
    workload: Workload,
    cluster: Cluster,
    *,
    alive: Collection[int] | None = None,
    previous: Plan | None = None,
    slots_per_rank: int | None = None,
    survive_ranks: int = 1,
    loads: np.ndarray | None = None,
    epoch: int = 0,
    pages_per_rank: int | None = None,
    roles: Mapping[int, str] | None = None,
    switch: str = "auto",
    protect: str = "copies",
    tensor: int | None = None,
) -> Plan:
    """A plan for the `alive` ranks (ids; all when None), valid and complete: every expert in a slot.

    `loads` is the traffic of each expert, float [moe_layers, experts], any scale; None means even.
    With `previous`, weights in place stay: lost experts replace spare copies, ranks that are new get
    copies, the slot count and the pages per rank stay as long as the experts fit. `roles` names the roles
    of ranks that are not collocated; else they have those of `previous`, but for what `switch` says of roles
    that too few ranks are left for (`planner.roles`). `protect` says how single losses are
    survived without the store: by second copies, by parity groups, or not. Ranks attend in groups of `tensor` (as in
    `previous`, or alone); those left of a broken group regroup, or hold experts only (`planner.groups`).
    Raises NoFeasiblePlan, saying what is missing, when the ranks alive cannot hold the model.
    """
    traffic = even_or_checked(loads, workload)
    if survive_ranks < 0:
        raise InputError(f"survive_ranks is {survive_ranks}; it must be at least 0")
    if protect not in PROTECTION:
        raise InputError(f"protect is {protect!r}, none of {', '.join(PROTECTION)}")
    if previous is not None and roles is None:
        roles = _inherited(workload, cluster, alive, previous, switch)
    if tensor is None:
        tensor = dict(previous.axes).get("tensor", 1) if previous else 1
    ranks = _places(cluster, alive, previous, roles or {}, tensor)
    holders = [r for r in ranks if r.role in HOLDS_EXPERTS]
    data = len({r.group for r in ranks if r.group >= 0})
    if not data and tensor > 1:
        raise NoFeasiblePlan(
            f"the {len(ranks)} ranks alive make no tensor group of {tensor} ranks of a host. Bring one of theirs back."
        )
    if not data:
        raise NoFeasiblePlan(f"none of the {len(ranks)} ranks alive attends. Bring an attention rank back.")
    slots = choose_slots(
        workload,
        cluster,
        len(holders),
        asked=slots_per_rank,
        before=previous.slots_per_rank if previous else None,
        survive_ranks=survive_ranks,
    )
    domain = domain_index(holders)
    if not workload.experts:
        table, groups = np.zeros((0, len(holders), 0), np.int32), ()
    elif previous is None:
        table, groups = fresh(traffic, domain, slots, protect=protect)
    else:
        table, groups = inherit(previous, holders, slots, traffic)
    if pages_per_rank is None:
        pages_per_rank = previous.pages_per_rank if previous else cache_pages(workload, cluster, slots, tensor=tensor)
    return Plan(
        epoch=epoch,
        ranks=tuple(ranks),
        slots_per_rank=slots,
        slots=as_tuples(table.reshape(len(table), len(holders) * slots)),
        experts=workload.experts,
        pages_per_rank=pages_per_rank,
        parity=groups,
        axes=(("data", data), ("tensor", tensor), ("expert", len(holders))),
    )


def _inherited(
    workload: Workload, cluster: Cluster, alive: Collection[int] | None, previous: Plan, switch: str
) -> Mapping[int, str]:
    """Roles of the ranks alive, where the plan before told attention from experts."""
    before = {r.id: r.role for r in previous.ranks}
    known = [d.id for d in cluster.alive(alive) if before.get(d.id) in ("attention", "expert")]
    if not known or "attention" not in before.values():
        return {}
    return roles_after(known, before, experts=workload.experts, slots=previous.slots_per_rank, switch=switch)


def _places(
    cluster: Cluster, alive: Collection[int] | None, previous: Plan | None, roles: Mapping[int, str], tensor: int
) -> list[RankPlace]:
    """The ranks alive with the role asked for, else the one they had, else collocated. Of a collocated plan those that
    are in no tensor group hold experts."""
    before = {r.id: r.role for r in previous.ranks} if previous else {}
    devices = cluster.alive(alive)
    role = {d.id: roles.get(d.id, before.get(d.id, "collocated")) for d in devices}
    apart = "attention" in role.values()
    regroup = ("expert",) if tensor > 1 and not apart else ()
    able = [d for d in devices if role[d.id] in (*SENDS_TOKENS, *regroup)]
    groups = tensor_groups(able, tensor, previous)
    place = {rank: (group, shard) for group, ids in enumerate(groups) for shard, rank in enumerate(ids)}
    attends = "attention" if apart else "collocated"
    found = []
    for d in devices:
        group, shard = place.get(d.id, (-1, 0))
        mine = role[d.id] if tensor == 1 or role[d.id] == "standby" else attends if group >= 0 else "expert"
        found.append(RankPlace(id=d.id, host=d.host, rack=d.rack, role=mine, group=group, shard=shard))
    return found


def even_or_checked(loads: np.ndarray | None, workload: Workload) -> np.ndarray:
    """Loads as shares of their layer's traffic, float [moe_layers, experts]; InputError on a wrong shape."""
    shape = (workload.moe_layers, workload.experts)
    if loads is None:
        return np.full(shape, 1.0 / max(1, workload.experts))
    loads = np.asarray(loads, np.float64)
    if loads.shape != shape:
        raise InputError(f"loads have shape {loads.shape}; the model has [moe_layers, experts] = {shape}")
    if not np.isfinite(loads).all() or (loads < 0).any():
        raise InputError("loads must be finite and at least 0")
    total = loads.sum(axis=1, keepdims=True)
    return np.where(total > 0, loads / np.where(total > 0, total, 1), 1.0 / max(1, workload.experts))


def domain_index(ranks: Sequence[RankPlace]) -> np.ndarray:
    """Index of the host of each rank, int [ranks], hosts numbered as they appear."""
    hosts = {h: i for i, h in enumerate(dict.fromkeys(r.host for r in ranks))}
    return np.array([hosts[r.host] for r in ranks], np.int64)


def fresh(
    loads: np.ndarray, domain: np.ndarray, slots: int, *, protect: str = "copies"
) -> tuple[np.ndarray, tuple[ParityGroup, ...]]:
    """A placement from nothing: slot table int32 [layers, ranks, slots] and parity groups."""
    ranks, experts = len(domain), loads.shape[1]
    hosts = int(domain.max()) + 1
    apart = domain if hosts > 2 else np.arange(ranks)
    members = max(1, min(8, (int(apart.max()) + 1) * 3 // 4))
    spare = parity_slots(loads, ranks * slots, ranks, members) if protect == "parity" else 0
    tries = max(1, min(60, int(TRIES_WORK // (len(loads) * (ranks * slots) ** 2))))
    table = _best_start(loads, domain, slots, protect == "copies", spare, tries)
    if not spare:
        return table, ()
    groups = tuple(ParityGroup(layer=a, slot=b, members=c) for a, b, c in form_groups(table, experts, apart, members))
    return np.where(table >= experts, -1, table), groups


def _best_start(loads: np.ndarray, domain: np.ndarray, slots: int, protect: bool, spare: int, tries: int) -> np.ndarray:
    """Placements counted and packed in several orders and cooled by swaps; on each layer the coolest."""
    best, lowest, idle = None, None, 0
    rng = np.random.default_rng(0)
    for attempt in range(tries):
        noise = 1 + NOISE[attempt % len(NOISE)] * rng.random(loads.shape)
        table = place(loads, domain, slots, protect=protect, parity=spare, order=noise)
        table = swap_down(table, loads, domain)
        hottest = peak(table, loads)
        if best is None or lowest is None:
            best, lowest = table, hottest
        cooler = hottest < lowest
        best = np.where(cooler[:, None, None], table, best)
        lowest = np.where(cooler, hottest, lowest)
        idle = 0 if cooler.any() else idle + 1
        alone = slot_loads(best, loads).max(axis=(1, 2)) * len(domain)
        if idle > PATIENCE or (lowest <= np.maximum(alone, 1.0) * EVEN).all():
            break
    assert best is not None
    return best


def inherit(
    previous: Plan, holders: Sequence[RankPlace], slots: int, loads: np.ndarray
) -> tuple[np.ndarray, tuple[ParityGroup, ...]]:
    """The previous placement on the ranks alive, lost experts placed, new ranks filled with copies."""
    layers, experts = loads.shape
    if (previous.moe_layers, previous.experts) != (layers, experts):
        raise InputError(
            f"the previous plan has {previous.moe_layers} layers x {previous.experts} experts, "
            f"the model {layers} x {experts}"
        )
    held = previous.slot_table().reshape(layers, len(previous.holders), previous.slots_per_rank)
    for i, group in enumerate(previous.parity):
        held[group.layer].reshape(-1)[group.slot] = experts + i
    where = {rank: at for at, rank in enumerate(previous.holder_ids)}
    old = [at for at, r in enumerate(holders) if r.id in where]
    shared = min(slots, previous.slots_per_rank)
    table = np.full((layers, len(holders), slots), -1, np.int32)
    table[:, old, :shared] = held[:, [where[holders[at].id] for at in old], :shared]
    present = np.zeros((layers, experts + len(previous.parity) + 1), bool)
    present[np.arange(layers)[:, None], table.reshape(layers, -1)] = True
    table = adopt(table, ~present[:, :experts], loads)
    new = np.ones(len(holders), bool)
    new[old] = False
    if new.any():
        table = fill_new(table, new, loads, domain_index(holders))
    groups = [
        replace(previous.parity[table[layer, rank, slot] - experts], slot=int(rank * slots + slot))
        for layer, rank, slot in np.argwhere(table >= experts)
    ]
    return np.where(table >= experts, -1, table), tuple(groups)


def peak_load(plan: Plan, loads: np.ndarray) -> np.ndarray:
    """Load of the hottest rank over the mean of a plan, float [moe_layers]."""
    return peak(plan.slot_table().reshape(plan.moe_layers, len(plan.holders), -1), loads)
