"""Laws of parity: any one member can be made again from the others, and no loss takes two of a group."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import Cluster, Hardware, Plan, PlannedRank, Workload, solve
from planner.failures.loss_model import LossModel
from planner.plan.deployment import Deployment
from planner.plan.plan import as_tuples
from planner.solver.parity_groups import ExpertSource, expert_locations, expert_sources, host_parity_groups
from tests.support.plans import with_masked

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
        hosts = [plan.expert_ranks[p // plan.slots_per_rank].host for p in places]
        assert len(set(hosts)) == len(hosts)
        assert table[group.layer, group.slot] == -1
    assert Plan.from_json(plan.to_json()) == plan


def test_most_single_copies_are_in_a_group_and_most_host_losses_need_no_store():
    plan = plan_on(12, 2, 4)
    covered = {(g.layer, m) for g in plan.parity for m in g.members}
    sole = {(int(a), int(b)) for a, b in np.argwhere(plan.copies() == 1)}
    assert len(covered & sole) >= 0.95 * len(sole)
    cluster = Cluster.regular("c", 12, 2, hardware=Hardware())
    losses = LossModel(Deployment(plan=plan, workload=WORKLOAD, cluster=cluster))
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
    before = {(g.layer, g.members): plan.expert_rank_ids[g.slot // 4] for g in plan.parity}
    for g in after.parity:
        assert after.expert_rank_ids[g.slot // 4] == before[g.layer, g.members]


@st.composite
def placements(draw: st.DrawFn) -> Plan:
    """Any experts in any slots of up to seven ranks on up to four hosts, some of which attend only; some are masked."""
    ranks = draw(st.integers(1, 7))
    hosts = draw(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks))
    roles = draw(st.lists(st.sampled_from(["collocated", "expert", "attention"]), min_size=ranks, max_size=ranks))
    roles[draw(st.integers(0, ranks - 1))] = "collocated"
    places = [PlannedRank(id=3 * i, host=f"h{h}", role=r) for i, (h, r) in enumerate(zip(hosts, roles, strict=True))]
    holders = sum(role != "attention" for role in roles)
    slots, layers = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    room = holders * slots
    spare = draw(st.integers(0, room - 1))
    experts = room - spare
    each = [*range(experts), *draw(st.lists(st.integers(-1, experts - 1), min_size=spare, max_size=spare))]
    shuffled = np.random.default_rng(draw(st.integers(0, 2**16)))
    table = np.array([shuffled.permutation(each) for _ in range(layers)])
    gone = draw(st.sets(st.integers(0, experts - 1), max_size=2))
    table[np.isin(table, list(gone))] = -1
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
    """The fault domains: hosts where there are more of them than members, else ranks."""
    by_host: dict[str, set[int]] = {}
    for rank in plan.ranks:
        by_host.setdefault(rank.host, set()).add(rank.id)
    return list(by_host.values()) if len(by_host) > members else [{rank} for rank in plan.rank_ids]


def everything_on(plan: Plan, alive: set[int]) -> Plan:
    """A plan in which each of these ranks holds every expert that the plan has."""
    places = tuple(replace(rank, role="collocated") for rank in plan.ranks if rank.id in alive)
    slots = tuple(tuple(range(plan.experts)) * len(places) for _ in plan.slots)
    after = replace(plan, ranks=places, slots=slots, slots_per_rank=plan.experts, masked=())
    return with_masked(after, plan.masked)


@settings(max_examples=100)
@given(placements(), st.integers(1, 6))
def test_whatever_one_loss_takes_of_any_placement_comes_back_from_what_is_kept(plan, members):
    groups, apart = host_parity_groups(plan, members), domains(plan, members)
    for dead in apart if len(apart) > 1 else []:
        alive = set(plan.rank_ids) - dead
        here, left = expert_locations(plan, plan.rank_ids), expert_locations(plan, alive)
        lost = {(layer, expert) for layer in range(plan.moe_layers) for expert in here[layer].keys() - left[layer]}
        found = expert_sources(groups, plan, everything_on(plan, alive))
        assert found.keys() == lost
        for (layer, expert), source in found.items():
            assert {expert, *dict(source.experts)} == set(source.group.members)
            assert source.group.rank in alive
            check_held(plan, layer, source, alive)


def check_held(plan: Plan, layer: int, source: ExpertSource, alive: set[int]) -> None:
    """Every rank that a source reads holds the expert."""
    for expert, rank in source.experts:
        at = plan.expert_rank_ids.index(rank) * plan.slots_per_rank
        assert rank in alive
        assert expert in plan.slots[layer][at : at + plan.slots_per_rank]


@settings(max_examples=100)
@given(placements(), st.integers(1, 6), st.data())
def test_wherever_the_next_plan_wants_an_expert_it_is_in_place_or_has_a_way_there(plan, members, data):
    groups, apart = host_parity_groups(plan, members), domains(plan, members)
    alive = set(plan.rank_ids) - (data.draw(st.sampled_from(apart)) if len(apart) > 1 else set())
    after = everything_on(plan, alive)
    table = after.slots_by_rank()
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=table.size, max_size=table.size))).reshape(table.shape)
    table[~keep] = -1
    after = replace(after, slots=as_tuples(table.reshape(plan.moe_layers, -1)), masked=())
    found = expert_sources(groups, plan, after)
    for layer in range(plan.moe_layers):
        before = {rank: expert_locations(plan, [rank])[layer].keys() for rank in alive}
        for expert in {*after.slots[layer]} - {-1}:
            wanted = [rank for rank in after.rank_ids if expert in expert_locations(after, [rank])[layer]]
            in_place = any(expert in before[rank] for rank in wanted)
            assert ((layer, expert) in found) == (not in_place)
            if not in_place:
                source = found[layer, expert]
                assert (source.group is None) == any(expert in held for held in before.values())
                assert source.group is not None or [e for e, _ in source.experts] == [expert]
                check_held(plan, layer, source, alive)


def test_a_rank_that_is_new_has_filled_its_slots_itself():
    ranks = [PlannedRank(id=i, host="h") for i in range(3)]
    before = Plan(epoch=0, ranks=tuple(ranks[:2]), slots_per_rank=2, slots=((0, 1, 1, 2),), experts=3)
    after = Plan(epoch=1, ranks=tuple(ranks), slots_per_rank=2, slots=((0, -1, 1, -1, 2, 0),), experts=3)
    assert expert_sources(host_parity_groups(before, 1), before, after) == {}


@settings(max_examples=100)
@given(placements(), st.integers(1, 6), st.data())
def test_of_a_group_that_lost_two_of_its_parts_nothing_comes_back(plan, members, data):
    groups = host_parity_groups(plan, members)
    alive = data.draw(st.sets(st.sampled_from(plan.rank_ids), min_size=1))
    left, found = expert_locations(plan, alive), expert_sources(groups, plan, everything_on(plan, alive))
    for group in groups:
        lost = [expert for expert in group.members if expert not in left[group.layer]]
        back = [expert for expert in group.members if (group.layer, expert) in found]
        assert back == (lost if len(lost) == 1 and group.rank in alive else [])


@settings(max_examples=100)
@given(placements(), st.integers(1, 6))
def test_no_more_is_kept_than_there_must_be_and_by_each_rank_alike(plan, members):
    groups, apart = host_parity_groups(plan, members), domains(plan, members)
    most = min(members, len(apart) - 1)
    where = {rank: i for i, dead in enumerate(apart) for rank in dead}
    for layer in range(plan.moe_layers):
        row = np.array(plan.slots[layer]).reshape(-1, plan.slots_per_rank)
        places = {
            e: {where[plan.expert_rank_ids[at]] for at in np.argwhere(row == e)[:, 0]} for e in set(row.ravel()) - {-1}
        }
        sole = [expert for expert, at in places.items() if len(at) == 1]
        count = [sum(places[expert] == {i} for expert in sole) for i in range(len(apart))]
        here = [group for group in groups if group.layer == layer]
        assert len(here) == (max(-(-len(sole) // most), *count) if most and sole else 0)
        grouped = sorted(itertools.chain.from_iterable(group.members for group in here))
        assert grouped == (sorted(sole) if most else [])
    assert groups == host_parity_groups(plan, members)


def test_a_loss_is_priced_by_what_is_kept():
    cluster = Cluster.regular("c", 1, 4, hardware=Hardware())
    plan = solve(WORKLOAD, cluster, slots_per_rank=22)
    deployment = Deployment(plan=plan, workload=WORKLOAD, cluster=cluster)
    bare, kept = LossModel(deployment), LossModel(deployment, host_groups=host_parity_groups(plan, 3))
    for rank in plan.rank_ids:
        without, outcome = bare.outcome((rank,)), kept.outcome((rank,))
        assert without.means["store"] == outcome.means["parity"] > 0
        assert outcome.from_memory
    assert kept.outcome(plan.rank_ids[:2]).means.get("store", 0) > 0
