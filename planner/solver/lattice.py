"""The lattice: plans for sets of lost ranks, ready before the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, islice
from math import comb

from planner.errors import NoFeasiblePlan
from planner.plan.plan import ATTENTION_ROLES, EXPERT_ROLES, ROLES, Plan
from planner.solver.problem import Problem
from planner.solver.solve import solve

MOVE_SECONDS = 0.02  # to move a loaded executable to another set of devices, measured on a CPU: 3 to 20 ms


@dataclass(frozen=True, kw_only=True)
class Lattice:
    """The plan for each prepared set of dead ranks, all derived from `plan`.

    `infeasible` has the losses that cannot be survived, each with the reason.
    """

    plan: Plan
    plans: Mapping[frozenset[int], Plan]
    infeasible: Mapping[frozenset[int], str] = field(default_factory=dict)

    def get(self, dead: Collection[int]) -> Plan | None:
        """The plan for the loss of exactly these ranks of `plan`, or None when it was not prepared."""
        return self.plans.get(frozenset(dead))

    def coverage(self) -> dict[int, float]:
        """Share of all losses of 1, 2, ... ranks that have a plan, by number of ranks lost."""
        n = len(self.plan.ranks)
        count: dict[int, int] = {}
        for dead in self.plans:
            count[len(dead)] = count.get(len(dead), 0) + 1
        return {size: count[size] / comb(n, size) for size in sorted(count)}

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of surviving ranks for which a program must be compiled, descending."""
        return tuple(sorted({len(p.ranks) for p in self.plans.values()}, reverse=True))


def build_lattice(problem: Problem, plan: Plan, *, depth: int = 1, limit: int = 4096) -> Lattice:
    """Plans for every loss of up to `depth` ranks and of every host, single losses first, at most `limit`.

    `plan` is the solution of `problem`. Each plan is derived from it: weights in place stay, and its epoch is the next.
    """
    return extend_lattice(Lattice(plan=plan, plans={}), problem, islice(loss_sets(plan, depth), limit))


def extend_lattice(lattice: Lattice, problem: Problem, more: Iterable[frozenset[int]]) -> Lattice:
    """The lattice with plans for more losses; losses that it has already, or of all ranks, are left out."""
    plan, plans, infeasible = lattice.plan, dict(lattice.plans), dict(lattice.infeasible)
    for dead in more:
        if dead in plans or dead in infeasible or len(dead) >= len(plan.ranks):
            continue
        try:
            plans[dead] = solve(problem.after_loss(plan, [r for r in plan.rank_ids if r not in dead]))
        except NoFeasiblePlan as error:
            infeasible[dead] = str(error)
    return Lattice(plan=plan, plans=plans, infeasible=infeasible)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The cost of preparing the losses of ranks, hosts and some pairs, without their plans.

    A program is compiled once for each mesh shape (the numbers of attention and expert ranks before any role change)
    and moved to every set of survivors: `MOVE_SECONDS` each, on every rank at the same time. `table_bytes` is the size
    of the slot tables of all sets in the front.
    """

    sets: int
    compiles: int
    mesh_sizes: tuple[int, ...]
    move_seconds: float
    table_bytes: int


def preparations(plan: Plan) -> dict[str, Preparation]:
    """The cost of lattices of growing size: ranks and hosts; with the pairs of each host; with every pair."""
    ranks = len(plan.ranks)
    of_a_host = sum(comb(n, 2) for n in Counter(r.host for r in plan.ranks).values())
    found = {"every rank and host": preparation(plan)}
    if ranks > 2:
        if 0 < of_a_host < comb(ranks, 2):
            found["and every pair of one host"] = preparation(plan, pairs=of_a_host)
        found["and every pair"] = preparation(plan, pairs=comb(ranks, 2))
    return found


def preparation(plan: Plan, *, pairs: int = 0) -> Preparation:
    """The cost of a lattice of every single rank, every host of the plan and `pairs` pairs of ranks."""
    ranks = len(plan.ranks)
    singles = [dead for dead in loss_sets(plan, 1) if len(dead) < ranks]
    sizes = {ranks - len(dead) for dead in singles} | ({ranks - 2} if pairs and ranks > 2 else set())
    roles = {r.id: r.role for r in plan.ranks}
    of_each_role = [i for role in ROLES for i in [i for i in roles if roles[i] == role][:2]]
    examples = [*singles, *(combinations(of_each_role, 2) if pairs and ranks > 2 else ())]
    if not {"attention", "standby"}.isdisjoint(roles.values()):
        shapes = {_mesh_sides(roles, len(plan.attention_rank_ids), len(plan.expert_ranks), dead) for dead in examples}
    else:  # the program of collocated ranks does not depend on which of them have attention
        shapes = {ranks - len(dead) for dead in examples}
    hosts_of_two = sum(n == 2 < ranks for n in Counter(r.host for r in plan.ranks).values())
    sets = len(singles) + max(0, min(pairs, comb(ranks, 2)) - hosts_of_two)
    slots = len(plan.expert_ranks) * plan.slots_per_rank
    return Preparation(
        sets=sets,
        compiles=len(shapes),
        mesh_sizes=tuple(sorted(sizes, reverse=True)),
        move_seconds=sets * MOVE_SECONDS,
        table_bytes=sets * plan.moe_layers * slots * 4,
    )


def _mesh_sides(roles: Mapping[int, str], attending: int, holding: int, dead: Collection[int]) -> tuple[int, int]:
    """The numbers of attention and of expert ranks after a loss, `attending` and `holding` before."""
    gone = [roles[i] for i in dead]
    return (
        attending - sum(role in ATTENTION_ROLES for role in gone),
        holding - sum(role in EXPERT_ROLES for role in gone),
    )


def loss_sets(plan: Plan, depth: int) -> Iterator[frozenset[int]]:
    """Sets of dead ranks, each once: ranks, hosts, pairs (the likely first), and so on up to `depth` ranks."""
    seen: set[frozenset[int]] = set()
    hosts: dict[str, set[int]] = {}
    for r in plan.ranks:
        hosts.setdefault(r.host, set()).add(r.id)

    def candidates() -> Iterator[frozenset[int]]:
        if depth >= 1:
            yield from (frozenset((r,)) for r in plan.rank_ids)
            yield from (frozenset(h) for h in hosts.values())
        if depth >= 2:
            yield from likely_pairs(plan)
        for size in range(2, depth + 1):
            yield from map(frozenset, combinations(plan.rank_ids, size))

    for dead in candidates():
        if dead not in seen and len(dead) < len(plan.ranks):
            seen.add(dead)
            yield dead


def likely_pairs(plan: Plan) -> Iterator[frozenset[int]]:
    """The pairs most likely to be lost at once: two ranks of a host, then two of a rack."""
    for domain in ("host", "rack"):
        groups: dict[str, list[int]] = {}
        for r in plan.ranks:
            if getattr(r, domain):
                groups.setdefault(getattr(r, domain), []).append(r.id)
        for ids in groups.values():
            yield from map(frozenset, combinations(ids, 2))
