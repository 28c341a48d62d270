"""Laws of solve: conservation, anti-affinity, minimal movement, any set of survivors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import Cluster, Hardware, InputError, NoFeasiblePlan, Plan, Problem, Workload, moves, solve
from planner.failures.loss_model import LossModel
from planner.plan.deployment import Deployment
from planner.solver.lattice import build_lattice
from tests.support.strategies import Case, cases


def solved(case: Case, **more):
    return solve(case.workload, case.cluster, slots_per_rank=case.slots, loads=case.loads, **more)


def by_rank(plan):
    return plan.slots_by_rank()


@given(cases())
def test_every_expert_has_a_slot_and_no_slot_is_wasted(case):
    plan = solved(case)
    plan.validate()
    copies = plan.copies()
    assert (copies >= 1).all()
    assert (copies <= case.ranks).all()
    full = min(case.slots * case.ranks, case.workload.experts * case.ranks)
    assert (copies.sum(axis=1) == full).all()


@given(cases())
def test_copies_of_an_expert_are_on_different_ranks(case):
    for layer in by_rank(solved(case)):
        for rank in layer:
            held = rank[rank >= 0]
            assert len(set(held)) == len(held)


@given(cases())
def test_two_slots_an_expert_are_enough_to_survive_any_rank(case):
    plan = solved(case)
    if case.ranks > 1 and case.slots * case.ranks >= 2 * case.workload.experts:
        assert (plan.copies() >= 2).all()


@given(ranks=st.integers(2, 8), experts=st.integers(1, 64))
def test_where_copies_cost_little_any_one_loss_is_survived_without_a_read(ranks, experts):
    little = Workload(
        name="mostly attention",
        layers=2,
        moe_layers=2,
        experts=experts,
        experts_per_token=1,
        expert_bytes=10,
        rest_bytes=10**9,
        cache_bytes_per_token=1,
        page_tokens=32,
        hidden_bytes=64,
    )
    assert (solve(little, Cluster.local(ranks)).copies() >= 2).all()
    dear = replace(little, expert_bytes=10**9)
    assert solve(dear, Cluster.local(ranks)).slots_per_rank == -(-experts // (ranks - 1))


@given(cases(), st.data())
def test_any_survivors_that_can_hold_the_model_get_a_valid_plan_and_others_an_error(case, data):
    plan = solved(case)
    alive = data.draw(st.sets(st.sampled_from(plan.rank_ids), min_size=1))
    after = solve(case.workload, case.cluster, alive=alive, previous=plan, loads=case.loads, epoch=1)
    after.validate()
    assert after.rank_ids == tuple(sorted(alive))
    assert after.epoch == 1
    if len(alive) * case.slots >= case.workload.experts:
        assert after.slots_per_rank == plan.slots_per_rank
    else:
        assert after.slots_per_rank == -(-case.workload.experts // len(alive))


@given(cases(), st.data())
def test_after_a_loss_only_lost_experts_move(case, data):
    plan = solved(case)
    alive = data.draw(st.sets(st.sampled_from(plan.rank_ids), min_size=1))
    after = solve(case.workload, case.cluster, alive=alive, previous=plan, loads=case.loads)
    keep = np.array([r in alive for r in plan.rank_ids])
    survivors = by_rank(plan)[:, keep].reshape(plan.moe_layers, -1)
    lost = sum(case.workload.experts - len(set(row) - {-1}) for row in survivors.tolist())
    made = moves(plan, after)
    assert len(made) == lost
    assert all(m.source == "store" for m in made)


@given(cases(), st.data())
def test_a_rank_that_returns_is_filled_and_nobody_else_moves(case, data):
    plan = solved(case)
    gone = data.draw(st.sampled_from(plan.rank_ids))
    if (case.ranks - 1) * case.slots < case.workload.experts or case.ranks == 1:
        return
    without = solve(case.workload, case.cluster, alive=set(plan.rank_ids) - {gone}, previous=plan)
    back = solve(case.workload, case.cluster, previous=without)
    back.validate()
    made = moves(without, back)
    assert {m.rank for m in made} == {gone}
    assert all(m.source == "peer" for m in made)
    assert len(made) == min(case.slots, case.workload.experts) * plan.moe_layers


@given(cases())
def test_the_same_problem_has_the_same_plan(case):
    assert solved(case) == solved(case)


def test_default_slots_let_the_wanted_number_of_ranks_die():
    workload = Workload(moe_layers=1, experts=8, experts_per_token=2, expert_bytes=1)
    assert solve(workload, Cluster.local(4)).slots_per_rank == 3
    assert solve(workload, Cluster.local(4), survive_ranks=2).slots_per_rank == 4
    assert solve(workload, Cluster.local(4), survive_ranks=0).slots_per_rank == 2
    assert solve(workload, Cluster.local(1)).slots_per_rank == 8


def test_too_few_slots_says_how_many_there_are_and_what_to_do():
    workload = Workload(moe_layers=1, experts=64, experts_per_token=2, expert_bytes=1)
    with pytest.raises(NoFeasiblePlan) as caught:
        solve(workload, Cluster.local(7), slots_per_rank=8)
    assert str(caught.value) == (
        "64 experts do not fit in 56 slots (7 ranks alive x 8 slots). Raise slots_per_rank to 10, or bring a rank back."
    )


def test_too_little_memory_says_how_much_is_needed():
    workload = Workload(moe_layers=2, experts=8, experts_per_token=2, expert_bytes=1000, rest_bytes=500)
    with pytest.raises(NoFeasiblePlan, match=r"4 slots per rank need 8,500 bytes .* room for 1 slots.* 8 would do"):
        solve(workload, Cluster.local(2, memory_bytes=3000))


def test_memory_takes_spare_slots_before_it_takes_the_model():
    workload = Workload(moe_layers=1, experts=8, experts_per_token=2, expert_bytes=1000)
    assert solve(workload, Cluster.local(4, memory_bytes=2500)).slots_per_rank == 2
    assert solve(workload, Cluster.local(4, memory_bytes=3500)).slots_per_rank == 3


def test_copies_sit_on_different_hosts_when_there_are_two():
    workload = Workload(moe_layers=3, experts=16, experts_per_token=2, expert_bytes=1)
    cluster = Cluster.regular("two", 2, 4, hardware=Hardware())
    plan = solve(workload, cluster, slots_per_rank=4)
    half = by_rank(plan).reshape(3, 2, -1)
    for layer in half:
        assert set(layer[0]) == set(layer[1]) == set(range(16))


def test_survivors_share_out_what_must_be_loaded():
    workload = Workload(moe_layers=12, experts=24, experts_per_token=2, expert_bytes=1)
    cluster = Cluster.local(6)
    plan = solve(workload, cluster, slots_per_rank=5)
    for dead in plan.rank_ids:
        after = solve(workload, cluster, alive=set(plan.rank_ids) - {dead}, previous=plan)
        made = Counter(m.rank for m in moves(plan, after))
        assert sum(made.values()) > 10
        assert max(made.values()) <= -(-sum(made.values()) // 5) + 1


def test_a_model_without_experts_has_plans_without_slots_for_every_loss():
    dense = Workload(
        moe_layers=0, experts=0, experts_per_token=0, expert_bytes=0, layers=3, rest_bytes=1000, hidden_bytes=64
    )
    cluster = Cluster.local(4)
    plan = solve(dense, cluster)
    assert (plan.slots_per_rank, plan.slots, plan.expert_to_slot().shape) == (0, (), (4, 0, 0))
    assert Plan.from_json(plan.to_json()) == plan
    lattice = build_lattice(Problem(workload=dense, cluster=cluster), plan, depth=2)
    assert lattice.coverage() == {1: 1.0, 2: 1.0}
    outcome = LossModel(Deployment(plan=plan, workload=dense, cluster=cluster)).outcome((1,))
    assert outcome.survivable
    assert (outcome.traffic_lost, outcome.means.get("store", 0)) == (0.0, 0)
    with pytest.raises(InputError, match="expert_bytes is 0"):
        Workload(moe_layers=1, experts=2, experts_per_token=1, expert_bytes=0)
