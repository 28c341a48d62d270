"""Laws of the lattice: every single loss is prepared, and each plan is for exactly that loss."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from planner import Cluster, Problem, Workload, build_lattice, solve
from planner.solver.lattice import extend_lattice, loss_sets, preparation, preparations
from tests.support.strategies import cases


@given(cases())
def test_every_single_loss_and_host_is_prepared_or_its_reason_known(case):
    plan = solve(case.workload, case.cluster, slots_per_rank=case.slots, loads=case.loads)
    lattice = build_lattice(Problem(workload=case.workload, cluster=case.cluster), plan)
    if case.ranks == 1:
        assert not lattice.plans
        return
    for rank in plan.rank_ids:
        after = lattice.get({rank})
        assert after is not None
        after.validate()
        assert after.rank_ids == tuple(r for r in plan.rank_ids if r != rank)
        assert after.epoch == plan.epoch + 1
    assert lattice.coverage()[1] == 1.0
    hosts = {r.host: set() for r in plan.ranks}
    for r in plan.ranks:
        hosts[r.host].add(r.id)
    for dead in hosts.values():
        assert len(dead) == case.ranks or lattice.get(dead) is not None


def test_depth_and_limit_choose_what_is_prepared():
    workload = Workload(moe_layers=1, experts=8, experts_per_token=2, expert_bytes=1)
    cluster = Cluster.local(4)
    plan = solve(workload, cluster)
    problem = Problem(workload=workload, cluster=cluster)
    deep = build_lattice(problem, plan, depth=3)
    assert deep.coverage() == {1: 1.0, 2: 1.0, 3: 1.0}
    assert set(deep.plans) == {frozenset(c) for k in (1, 2, 3) for c in combinations(range(4), k)}
    assert deep.sizes == (3, 2, 1)
    assert len(build_lattice(problem, plan, depth=3, limit=5).plans) == 5


def test_losses_that_come_to_be_possible_are_added_and_no_plan_changes():
    workload = Workload(moe_layers=1, experts=8, experts_per_token=2, expert_bytes=1)
    before = Cluster.local(4, hosts=["a", "a", "b", "b"])
    plan = solve(workload, before)
    lattice = build_lattice(Problem(workload=workload, cluster=before), plan)
    moved = Cluster.local(4, hosts=["b", "a", "b", "b"])
    hosts = [frozenset(ids) for ids in moved.domains("host").values()]
    assert lattice.get({0, 2, 3}) is None
    more = extend_lattice(lattice, Problem(workload=workload, cluster=moved), [*hosts, frozenset(plan.rank_ids)])
    after = more.get({0, 2, 3})
    assert after is not None
    assert after.rank_ids == (1,)
    after.validate()
    assert more.plans.keys() - lattice.plans.keys() == {frozenset({0, 2, 3})}
    assert all(more.plans[dead] is kept for dead, kept in lattice.plans.items())


def test_a_loss_that_memory_cannot_survive_is_kept_with_its_reason():
    workload = Workload(moe_layers=1, experts=8, experts_per_token=2, expert_bytes=1000)
    cluster = Cluster.local(2, memory_bytes=5000)
    problem = Problem(workload=workload, cluster=cluster)
    lattice = build_lattice(problem, solve(workload, cluster))
    assert lattice.get({0}) is None
    assert "8 slots per rank need 8,000 bytes" in lattice.infeasible[frozenset({0})]


@given(cases())
def test_pairs_of_one_host_are_prepared_before_all_others(case):
    plan = solve(case.workload, case.cluster, slots_per_rank=case.slots)
    host = {r.id: r.host for r in plan.ranks}
    found = [dead for dead in loss_sets(plan, 2) if len(dead) == 2 and len(dead) < case.ranks]
    pairs = {frozenset(p) for p in combinations(plan.rank_ids, 2)} if case.ranks > 2 else set()
    assert len(found) == len(set(found))
    assert set(found) == pairs
    together = [len({host[i] for i in dead}) == 1 for dead in found]
    assert together == sorted(together, reverse=True)


@given(cases())
def test_a_lattice_of_every_pair_is_the_one_whose_cost_is_said(case):
    plan = solve(case.workload, case.cluster, slots_per_rank=case.slots)
    said = preparations(plan)
    if case.ranks > 2:
        lattice = list(loss_sets(plan, 2))
        assert said["and every pair"].sets == len(lattice)
        assert said["and every pair"].mesh_sizes == tuple(sorted({case.ranks - len(d) for d in lattice}, reverse=True))
    else:
        assert list(said) == ["every rank and host"]


@given(cases())
def test_what_preparing_takes_is_what_the_lattice_then_holds(case):
    plan = solve(case.workload, case.cluster, slots_per_rank=case.slots)
    lattice, ready = build_lattice(Problem(workload=case.workload, cluster=case.cluster), plan), preparation(plan)
    assert ready.sets == len(lattice.plans)
    assert ready.mesh_sizes == lattice.sizes
    assert ready.compiles == len(lattice.sizes)


@given(st.integers(1, 5), st.integers(1, 5))
def test_ranks_that_attend_and_ranks_that_hold_experts_make_more_shapes_of_a_size(attention, experts):
    workload = Workload(moe_layers=1, experts=4, experts_per_token=1, expert_bytes=1)
    roles = {i: "attention" if i < attention else "expert" for i in range(attention + experts)}
    hosts = [f"h{i}" for i in roles]
    plan = solve(workload, Cluster.local(len(roles), hosts=hosts), roles=roles, slots_per_rank=4)
    lattice = list(loss_sets(plan, min(2, len(roles) - 1)))
    shapes = {
        (sum(i < attention for i in set(roles) - d), sum(i >= attention for i in set(roles) - d)) for d in lattice
    }
    assert list(preparations(plan).values())[-1].compiles == len(shapes)
