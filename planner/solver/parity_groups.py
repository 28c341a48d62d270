"""Parity groups: the room of one expert that protects several which have only one copy.

It holds the XOR of its members' weights. Members and the XOR are on different hosts (on different
ranks where there are too few hosts), so one loss takes at most one of them and the rest can rebuild it.

A plan of `--protect parity` has the XOR in a slot (`form_groups`); a server keeps it in the host memory of a rank
(`kept_groups`), where it takes no slot and any rank may keep any number of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from planner.copies import copy_counts
from planner.plan import Plan

FULL = 0.9  # part of the room in groups that is planned with; members get in each other's way


def parity_slots(loads: np.ndarray, slots: int, ranks: int, members: int) -> int:
    """The fewest parity slots per layer for groups of `members`, so that every sole copy is in a group."""
    experts = loads.shape[1]
    for count in range(slots - experts + 1):
        copies = copy_counts(loads, slots - count, ranks, protect=False)
        if (copies == 1).sum(axis=1).max() <= FULL * members * count:
            return count
    return 0


def form_groups(
    table: np.ndarray, experts: int, domain: np.ndarray, members: int
) -> list[tuple[int, int, tuple[int, ...]]]:
    """(layer, physical slot, members) for each parity slot, those numbered from `experts` up in `table`.

    Sole copies go, from the fault domain with the most of them, to the emptiest groups that have nothing
    in that domain yet; an expert that finds none stays unprotected.
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
            here = int(where[slot])
            free = [g for g in range(len(parity)) if here not in used[g] and len(chosen[g]) < members]
            if free:
                best = min(free, key=lambda g: (len(chosen[g]), g))
                chosen[best].append(int(flat[slot]))
                used[best].add(here)
        groups += [(layer, int(s), tuple(sorted(m))) for s, m in zip(parity, chosen, strict=True) if m]
    return groups


@dataclass(frozen=True, kw_only=True)
class KeptGroup:
    """The XOR of the weights of the experts `members` of MoE layer `layer`, in the host memory of rank `keeper`."""

    layer: int
    members: tuple[int, ...]
    keeper: int


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an expert comes from the memory of ranks: it is the XOR of what `group` keeps, if there is one, and of
    experts, each on a rank that holds it."""

    group: KeptGroup | None
    held: tuple[tuple[int, int], ...]
    """(expert, rank)."""


def kept_groups(plan: Plan, members: int) -> tuple[KeptGroup, ...]:
    """Groups of up to `members` for every expert whose copies one loss would take.

    A loss is that of a host where there are more than `members` of them, else of a rank. As few groups as there can be
    on each layer: each takes one expert from each of the domains that have most left. None where there is one domain.
    """
    several = len({r.host for r in plan.ranks}) > members
    domain = {r.id: r.host if several else r.id for r in plan.ranks}
    most = min(members, len(set(domain.values())) - 1)
    if most < 1:
        return ()
    where = [domain[rank] for rank in plan.holder_ids for _ in range(plan.slots_per_rank)]
    kept = dict.fromkeys(domain, 0)
    groups = []
    for layer, row in enumerate(plan.slots):
        homes: dict[int, set[str | int]] = {}
        for expert, home in zip(row, where, strict=True):
            homes.setdefault(expert, set()).add(home)
        left: dict[str | int, list[int]] = {}
        for expert in sorted(homes.keys() - {-1}, reverse=True):
            if len(homes[expert]) == 1:
                left.setdefault(homes[expert].pop(), []).append(expert)
        while left:
            chosen = sorted(left, key=lambda home: -len(left[home]))[:most]
            keeper = min((rank for rank in kept if domain[rank] not in chosen), key=lambda rank: (kept[rank], rank))
            kept[keeper] += 1
            groups.append(KeptGroup(layer=layer, members=tuple(sorted(left[h].pop() for h in chosen)), keeper=keeper))
            left = {home: experts for home, experts in left.items() if experts}
    return tuple(groups)


def homes(held: Plan, alive: Collection[int]) -> list[dict[int, int]]:
    """The rank in `alive` that holds each expert under the plan `held`, one of them, by MoE layer."""
    found: list[dict[int, int]] = []
    owner = [rank for rank in held.holder_ids for _ in range(held.slots_per_rank)]
    for row in held.slots:
        there = zip(row, owner, strict=True)
        found.append({expert: rank for expert, rank in there if expert >= 0 and rank in alive})
    return found


def ways(groups: Iterable[KeptGroup], held: Plan, plan: Plan) -> dict[tuple[int, int], Way]:
    """How the experts that no rank of `plan` has in place under `held` come to be there, by (MoE layer, expert).

    Some rank of the plan may hold an expert that is to be on another one; else it takes a group of which nothing else
    is lost. What neither has is left out.
    """
    here, found = homes(held, plan.rank_ids), {}
    absent = _absent(held, plan)
    for layer, expert in absent:
        if expert in here[layer]:
            found[layer, expert] = Way(group=None, held=((expert, here[layer][expert]),))
    for group in groups:
        there = here[group.layer]
        lost = [expert for expert in group.members if expert not in there]
        if group.keeper in plan.rank_ids and len(lost) == 1 and (group.layer, lost[0]) in absent:
            others = tuple((expert, there[expert]) for expert in group.members if expert in there)
            found[group.layer, lost[0]] = Way(group=group, held=others)
    return found


def _absent(held: Plan, plan: Plan) -> set[tuple[int, int]]:
    """(MoE layer, expert) that a plan has in slots, but in none of a rank that holds them already. A rank that is new
    has filled its slots before it came."""
    before = {rank: held.slots_of(rank).tolist() for rank in held.holder_ids}
    now = {rank: plan.slots_of(rank).tolist() for rank in plan.holder_ids}
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
