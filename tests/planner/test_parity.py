"""Laws of parity: any one member can be made again from the others, and no loss takes two of a group."""

from __future__ import annotations

import functools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import Cluster, Hardware, Plan, Workload, solve
from planner.degrade import Losses
from planner.deployment import Deployment

WORKLOAD = Workload(moe_layers=2, experts=64, experts_per_token=2, expert_bytes=100, cache_bytes_per_token=1)


def plan_on(hosts: int, per_host: int, slots: int, seed: int = 0) -> Plan:
    loads = np.random.default_rng(seed).pareto(1.5, (2, 64)) + 0.05
    cluster = Cluster.regular("c", hosts, per_host, hardware=Hardware())
    return solve(WORKLOAD, cluster, slots_per_rank=slots, loads=loads, protect="parity")


@settings(max_examples=10)
@given(st.sampled_from([(8, 1, 10), (16, 1, 6), (8, 4, 3), (12, 2, 4)]), st.integers(0, 5))
def test_members_and_their_parity_slot_are_in_different_fault_domains(shape, seed):
    plan = plan_on(*shape, seed)
    assert plan.parity
    table = plan.slot_table()
    for group in plan.parity:
        places = [group.slot, *(int(np.flatnonzero(table[group.layer] == m)[0]) for m in group.members)]
        hosts = [plan.holders[p // plan.slots_per_rank].host for p in places]
        assert len(set(hosts)) == len(hosts)
        assert table[group.layer, group.slot] == -1
    assert Plan.from_json(plan.to_json()) == plan


def test_most_single_copies_are_in_a_group_and_most_host_losses_need_no_store():
    plan = plan_on(12, 2, 4)
    covered = {(g.layer, m) for g in plan.parity for m in g.members}
    sole = {(int(a), int(b)) for a, b in np.argwhere(plan.copies() == 1)}
    assert len(covered & sole) >= 0.95 * len(sole)
    cluster = Cluster.regular("c", 12, 2, hardware=Hardware())
    losses = Losses(Deployment(plan=plan, workload=WORKLOAD, cluster=cluster))
    by_host = [losses.outcome(ids, kind="host") for ids in cluster.domains("host").values()]
    assert all(o.survivable for o in by_host)
    assert any(o.means.get("parity") for o in by_host)
    rebuilt = sum(o.means.get("parity", 0) for o in by_host)
    stored = sum(o.means.get("store", 0) for o in by_host)
    assert rebuilt >= 0.9 * (rebuilt + stored)


@given(st.integers(2, 8), st.integers(0, 2**16))
def test_the_xor_of_the_rest_is_the_member_that_was_lost(members, seed):
    weights = np.random.default_rng(seed).normal(size=(members, 33)).astype(np.float32).view(np.uint32)
    slot = functools.reduce(np.bitwise_xor, weights)
    for lost in range(members):
        rest = [weights[i] for i in range(members) if i != lost]
        assert (functools.reduce(np.bitwise_xor, rest, slot) == weights[lost]).all()


def test_a_loss_keeps_groups_whose_slot_is_left_and_experts_give_way_last():
    plan = plan_on(12, 2, 4)
    cluster = Cluster.regular("c", 12, 2, hardware=Hardware())
    after = solve(WORKLOAD, cluster, alive=plan.rank_ids[1:], previous=plan)
    after.validate()
    assert len(after.parity) >= len(plan.parity) - 2 * plan.slots_per_rank
    before = {(g.layer, g.members): plan.holder_ids[g.slot // 4] for g in plan.parity}
    for g in after.parity:
        assert after.holder_ids[g.slot // 4] == before[g.layer, g.members]
