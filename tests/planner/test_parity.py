"""Laws of parity: any one member can be made again from the others, and no loss takes two of a group."""

from __future__ import annotations

import functools
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import Cluster, Hardware, Plan, RankPlace, Workload, solve
from planner.degrade import Losses
from planner.deployment import Deployment
from planner.parity import homes, kept_groups, rebuilds
from planner.plan import as_tuples

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


@st.composite
def placements(draw: st.DrawFn) -> Plan:
    """Any experts in any slots of up to seven ranks on up to four hosts, some of which attend only; some are masked."""
    ranks = draw(st.integers(1, 7))
    hosts = draw(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks))
    roles = draw(st.lists(st.sampled_from(["collocated", "expert", "attention"]), min_size=ranks, max_size=ranks))
    roles[draw(st.integers(0, ranks - 1))] = "collocated"
    places = [RankPlace(id=3 * i, host=f"h{h}", role=r) for i, (h, r) in enumerate(zip(hosts, roles, strict=True))]
    holders = sum(role != "attention" for role in roles)
    slots, experts = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    table = np.array(
        draw(
            st.lists(
                st.lists(st.integers(-1, experts - 1), min_size=holders * slots, max_size=holders * slots),
                min_size=1,
                max_size=2,
            )
        )
    )
    masked = tuple((a, b) for a in range(len(table)) for b in range(experts) if b not in table[a])
    return Plan(
        epoch=0,
        ranks=tuple(places),
        slots_per_rank=slots,
        slots=as_tuples(table),
        experts=experts,
        masked=masked,
    )


def domains(plan: Plan, members: int) -> list[set[int]]:
    """What one loss takes: a host where there are more of them than members, else a rank."""
    by_host: dict[str, set[int]] = {}
    for rank in plan.ranks:
        by_host.setdefault(rank.host, set()).add(rank.id)
    return list(by_host.values()) if len(by_host) > members else [{rank} for rank in plan.rank_ids]


@given(placements(), st.integers(1, 6))
def test_whatever_one_loss_takes_of_any_placement_comes_back_from_what_is_kept(plan, members):
    groups, apart = kept_groups(plan, members), domains(plan, members)
    for dead in apart if len(apart) > 1 else []:
        alive = set(plan.rank_ids) - dead
        here, left = homes(plan, plan.rank_ids), homes(plan, alive)
        lost = {(layer, expert) for layer in range(plan.moe_layers) for expert in here[layer].keys() - left[layer]}
        back = rebuilds(groups, plan, alive)
        assert back.keys() == lost
        for (layer, expert), way in back.items():
            assert {expert, *dict(way.others)} == set(way.group.members)
            assert way.group.keeper in alive
            for other, rank in way.others:
                at = plan.holder_ids.index(rank) * plan.slots_per_rank
                assert rank in alive
                assert other in plan.slots[layer][at : at + plan.slots_per_rank]


@given(placements(), st.integers(1, 6), st.data())
def test_of_a_group_that_lost_two_of_its_parts_nothing_comes_back(plan, members, data):
    groups = kept_groups(plan, members)
    alive = data.draw(st.sets(st.sampled_from(plan.rank_ids)))
    left, back = homes(plan, alive), rebuilds(groups, plan, alive)
    for group in groups:
        lost = [expert for expert in group.members if expert not in left[group.layer]]
        back_of = [expert for expert in group.members if (group.layer, expert) in back]
        assert back_of == (lost if len(lost) == 1 and group.keeper in alive else [])


@given(placements(), st.integers(1, 6))
def test_no_more_is_kept_than_there_must_be_and_by_each_rank_alike(plan, members):
    groups, apart = kept_groups(plan, members), domains(plan, members)
    most = min(members, len(apart) - 1)
    where = {rank: i for i, dead in enumerate(apart) for rank in dead}
    for layer in range(plan.moe_layers):
        row = np.array(plan.slots[layer]).reshape(-1, plan.slots_per_rank)
        places = {
            e: {where[plan.holder_ids[at]] for at in np.argwhere(row == e)[:, 0]} for e in set(row.ravel()) - {-1}
        }
        sole = [expert for expert, at in places.items() if len(at) == 1]
        count = [sum(places[expert] == {i} for expert in sole) for i in range(len(apart))]
        here = [group for group in groups if group.layer == layer]
        assert len(here) == (max(-(-len(sole) // most), *count) if most and sole else 0)
        grouped = sorted(itertools.chain.from_iterable(group.members for group in here))
        assert grouped == (sorted(sole) if most else [])
    assert groups == kept_groups(plan, members)


def test_a_loss_is_priced_by_what_is_kept():
    cluster = Cluster.regular("c", 1, 4, hardware=Hardware())
    plan = solve(WORKLOAD, cluster, slots_per_rank=22)
    deployment = Deployment(plan=plan, workload=WORKLOAD, cluster=cluster)
    bare, kept = Losses(deployment), Losses(deployment, kept=kept_groups(plan, 3))
    for rank in plan.rank_ids:
        without, outcome = bare.outcome((rank,)), kept.outcome((rank,))
        assert without.means["store"] == outcome.means["parity"] > 0
        assert outcome.from_memory
    assert kept.outcome(plan.rank_ids[:2]).means.get("store", 0) > 0
