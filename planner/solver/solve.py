"""From a problem to a plan: roles, tensor groups, slots and placement, with as few moves as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from planner.errors import NoFeasiblePlan
from planner.plan.plan import ATTENTION_ROLES, EXPERT_ROLES, ParityGroup, Plan, PlannedRank, as_tuples
from planner.solver.backfill import inherit_placement
from planner.solver.balance import host_index
from planner.solver.placement import place_afresh
from planner.solver.problem import Problem
from planner.solver.roles import roles_after
from planner.solver.shapes import cache_pages, slots_per_rank
from planner.solver.tensor_groups import tensor_groups


def solve(problem: Problem) -> Plan:
    """A plan for the ranks alive, valid and complete: every expert is in a slot.

    With a previous plan, weights in place stay: lost experts replace spare copies, ranks that are new get copies, and
    the slots and pages per rank stay as long as the experts fit. Ranks left of a broken tensor group regroup, or hold
    experts only (`planner.solver.tensor_groups`). Raises NoFeasiblePlan, saying what is missing, when the ranks alive
    cannot hold the model.
    """
    previous, tensor = problem.previous, problem.tensor_width
    ranks = _planned_ranks(problem)
    expert_ranks = [r for r in ranks if r.role in EXPERT_ROLES]
    data = len({r.group for r in ranks if r.group >= 0})
    if not data and tensor > 1:
        raise NoFeasiblePlan(
            f"the {len(ranks)} ranks alive make no tensor group of {tensor} ranks of a host. Bring one of theirs back."
        )
    if not data:
        raise NoFeasiblePlan(f"none of the {len(ranks)} ranks alive attends. Bring an attention rank back.")
    slots = slots_per_rank(
        problem.workload,
        problem.cluster,
        len(expert_ranks),
        asked=problem.slots_per_rank,
        before=previous.slots_per_rank if previous else None,
        survive_ranks=problem.survive_ranks,
    )
    table, parity = _placement(problem, expert_ranks, slots)
    pages = problem.pages_per_rank
    if pages is None and previous is not None:
        pages = previous.pages_per_rank
    elif pages is None:
        pages = cache_pages(problem.workload, problem.cluster, slots, tensor=tensor)
    return Plan(
        epoch=problem.epoch,
        ranks=tuple(ranks),
        slots_per_rank=slots,
        slots=as_tuples(table.reshape(len(table), len(expert_ranks) * slots)),
        experts=problem.workload.experts,
        pages_per_rank=pages,
        parity=parity,
        axes=(("data", data), ("tensor", tensor), ("expert", len(expert_ranks))),
    )


def _placement(
    problem: Problem, expert_ranks: Sequence[PlannedRank], slots: int
) -> tuple[np.ndarray, tuple[ParityGroup, ...]]:
    """The slot table, int32 [moe_layers, expert ranks, slots], and the parity groups."""
    if not problem.workload.experts:
        return np.zeros((0, len(expert_ranks), 0), np.int32), ()
    if problem.previous is not None:
        return inherit_placement(problem.previous, expert_ranks, slots, problem.load_shares)
    hosts = host_index(expert_ranks)
    return place_afresh(problem.load_shares, hosts, slots, protect=problem.protect, speed=problem.speed)


def _wanted_roles(problem: Problem) -> Mapping[int, str]:
    """The roles asked for; without any, the roles that `planner.solver.roles` gives the ranks left of a previous
    disaggregated plan."""
    if problem.roles is not None or problem.previous is None:
        return problem.roles or {}
    previous = problem.previous
    before = {r.id: r.role for r in previous.ranks}
    known = [d.id for d in problem.devices if before.get(d.id) in ("attention", "expert")]
    if not known or "attention" not in before.values():
        return {}
    experts = problem.workload.experts
    return roles_after(known, before, experts=experts, slots=previous.slots_per_rank, switch=problem.switch)


def _planned_ranks(problem: Problem) -> list[PlannedRank]:
    """The ranks alive, each with the role that is wanted, else the one it had, else collocated, and its tensor group.

    Ranks of a collocated plan that are in no tensor group hold experts only.
    """
    previous, tensor, wanted = problem.previous, problem.tensor_width, _wanted_roles(problem)
    before = {r.id: r.role for r in previous.ranks} if previous else {}
    role = {d.id: wanted.get(d.id, before.get(d.id, "collocated")) for d in problem.devices}
    disaggregated = "attention" in role.values()
    can_attend = ATTENTION_ROLES if tensor == 1 or disaggregated else (*ATTENTION_ROLES, "expert")
    groups = tensor_groups([d for d in problem.devices if role[d.id] in can_attend], tensor, previous)
    place = {rank: (group, shard) for group, ids in enumerate(groups) for shard, rank in enumerate(ids)}
    ranks = []
    for d in problem.devices:
        group, shard = place.get(d.id, (-1, 0))
        if tensor > 1 and role[d.id] != "standby":
            role[d.id] = "expert" if group < 0 else "attention" if disaggregated else "collocated"
        ranks.append(PlannedRank(id=d.id, host=d.host, rack=d.rack, role=role[d.id], group=group, shard=shard))
    return ranks
