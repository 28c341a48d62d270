"""Parity groups: the XOR of several experts' weights, in the memory of one, protects experts with a single copy.

The members of a group and their XOR are on different hosts (on different ranks where there are too few hosts), so that
one loss takes at most one of them and the others can rebuild it.

A plan of `--protect parity` has the XOR in a slot (`slot_parity_groups`). A server has it in the host memory of a rank
(`host_parity_groups`), where it takes no slot and any rank may hold any number of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from planner.plan.plan import Plan
from planner.solver.replicas import copy_counts

FULL = 0.9  # share of the places in groups that can be filled; members must not share a fault domain


def parity_slots(loads: np.ndarray, slots: int, ranks: int, members: int) -> int:
    """The fewest parity slots per layer with which every expert with a single copy is in a group of `members`."""
    experts = loads.shape[1]
    for count in range(slots - experts + 1):
        copies = copy_counts(loads, slots - count, ranks, protect=False)
        if (copies == 1).sum(axis=1).max() <= FULL * members * count:
            return count
    return 0


def slot_parity_groups(
    table: np.ndarray, experts: int, domain: np.ndarray, members: int
) -> list[tuple[int, int, tuple[int, ...]]]:
    """(layer, physical slot, members) of each parity slot; those are numbered from `experts` up in `table`.

    Experts with a single copy go, from the fault domain with the most of them, to the smallest group that has no member
    in that domain; an expert for which there is no such group stays unprotected.
    """
    groups = []
    for layer, rows in enumerate(table):
        flat = rows.ravel()
        where = np.repeat(domain, rows.shape[1])
        parity = np.flatnonzero(flat >= experts)
        counts = np.bincount(flat[(flat >= 0) & (flat < experts)], minlength=experts)
        sole = np.flatnonzero((flat >= 0) & (flat < experts) & (counts[np.clip(flat, 0, experts - 1)] == 1))
        chosen: list[list[int]] = [[] for _ in parity]
        used = [{int(where[slot])} for slot in parity]
        weight = np.bincount(where[sole], minlength=int(domain.max()) + 1)
        for slot in sole[np.argsort(-weight[where[sole]], kind="stable")]:
            host = int(where[slot])
            free = [g for g in range(len(parity)) if host not in used[g] and len(chosen[g]) < members]
            if free:
                best = min(free, key=lambda g: (len(chosen[g]), g))
                chosen[best].append(int(flat[slot]))
                used[best].add(host)
        groups += [(layer, int(s), tuple(sorted(m))) for s, m in zip(parity, chosen, strict=True) if m]
    return groups


@dataclass(frozen=True, kw_only=True)
class HostParityGroup:
    """The XOR of the weights of the experts `members` of MoE layer `layer`, in the host memory of rank `rank`."""

    layer: int
    members: tuple[int, ...]
    rank: int


@dataclass(frozen=True, kw_only=True)
class ExpertSource:
    """Where an expert's weights come from in the memory of ranks: the XOR of `experts` and of the parity of `group`.

    `experts` are (expert, rank that holds it); without a `group` it is the one expert itself.
    """

    group: HostParityGroup | None
    experts: tuple[tuple[int, int], ...]


def host_parity_groups(plan: Plan, members: int) -> tuple[HostParityGroup, ...]:
    """Groups of up to `members` experts, for every expert whose copies one loss would take.

    Fault domains are hosts where there are more than `members` of them, else ranks. Each layer has the fewest groups
    possible: a group takes one expert from each of the domains with the most left. No groups with a single domain.
    """
    several = len({r.host for r in plan.ranks}) > members
    domain = {r.id: r.host if several else r.id for r in plan.ranks}
    most = min(members, len(set(domain.values())) - 1)
    if most < 1:
        return ()
    where = [domain[rank] for rank in plan.expert_rank_ids for _ in range(plan.slots_per_rank)]
    kept = dict.fromkeys(domain, 0)
    groups = []
    for layer, row in enumerate(plan.slots):
        domains: dict[int, set[str | int]] = {}
        for expert, its_domain in zip(row, where, strict=True):
            domains.setdefault(expert, set()).add(its_domain)
        left: dict[str | int, list[int]] = {}
        for expert in sorted(domains.keys() - {-1}, reverse=True):
            if len(domains[expert]) == 1:
                left.setdefault(domains[expert].pop(), []).append(expert)
        while left:
            chosen = sorted(left, key=lambda each: -len(left[each]))[:most]
            rank = min((rank for rank in kept if domain[rank] not in chosen), key=lambda rank: (kept[rank], rank))
            kept[rank] += 1
            groups.append(HostParityGroup(layer=layer, members=tuple(sorted(left[h].pop() for h in chosen)), rank=rank))
            left = {each: experts for each, experts in left.items() if experts}
    return tuple(groups)


def expert_locations(held: Plan, alive: Collection[int]) -> list[dict[int, int]]:
    """A rank in `alive` that holds each expert under the plan `held`: {expert: rank} by MoE layer."""
    found: list[dict[int, int]] = []
    owner = [rank for rank in held.expert_rank_ids for _ in range(held.slots_per_rank)]
    for row in held.slots:
        pairs = zip(row, owner, strict=True)
        found.append({expert: rank for expert, rank in pairs if expert >= 0 and rank in alive})
    return found


def expert_sources(groups: Iterable[HostParityGroup], held: Plan, plan: Plan) -> dict[tuple[int, int], ExpertSource]:
    """Sources of the experts that no rank of `plan` has in place under `held`, by (MoE layer, expert).

    The source is another rank of the plan that holds the expert, else a parity group that has lost nothing else. An
    expert without either is left out.
    """
    rank_of, found = expert_locations(held, plan.rank_ids), {}
    absent = _absent(held, plan)
    for layer, expert in absent:
        if expert in rank_of[layer]:
            found[layer, expert] = ExpertSource(group=None, experts=((expert, rank_of[layer][expert]),))
    for group in groups:
        rank_with = rank_of[group.layer]
        lost = [expert for expert in group.members if expert not in rank_with]
        if group.rank in plan.rank_ids and len(lost) == 1 and (group.layer, lost[0]) in absent:
            others = tuple((expert, rank_with[expert]) for expert in group.members if expert in rank_with)
            found[group.layer, lost[0]] = ExpertSource(group=group, experts=others)
    return found


def _absent(held: Plan, plan: Plan) -> set[tuple[int, int]]:
    """(MoE layer, expert) pairs that have slots in `plan`, but on no rank that holds them already under `held`.

    A rank that is not in `held` counts as holding its slots: it fills them before it joins.
    """
    before = {rank: held.slots_of(rank).tolist() for rank in held.expert_rank_ids}
    now = {rank: plan.slots_of(rank).tolist() for rank in plan.expert_rank_ids}
    absent: set[tuple[int, int]] = set()
    for layer, row in enumerate(plan.slots):
        in_place: set[int] = set()
        for rank, slots in now.items():
            if rank in before:
                in_place |= {*slots[layer]} & {*before[rank][layer]}
            elif rank not in held.rank_ids:
                in_place |= {*slots[layer]}
        absent |= {(layer, expert) for expert in {*row} - in_place - {-1}}
    return absent
