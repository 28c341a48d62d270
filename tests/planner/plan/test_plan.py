"""Laws of the Plan: its JSON gives it back, its tables agree, what contradicts itself is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from planner import Cluster, InvalidPlan, Plan, Workload, solve
from planner.plan.plan import ParityGroup
from tests.support.plans import with_masked
from tests.support.strategies import cases


def small(**more) -> Plan:
    workload = Workload(moe_layers=2, experts=8, experts_per_token=2, expert_bytes=1)
    return solve(workload, Cluster.local(4), **more)


@given(cases())
def test_json_gives_back_the_plan(case):
    plan = solve(case.workload, case.cluster, slots_per_rank=case.slots, loads=case.loads, epoch=3)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


@given(cases())
def test_every_source_sends_each_expert_to_a_slot_that_holds_it(case):
    plan = solve(case.workload, case.cluster, slots_per_rank=case.slots, loads=case.loads)
    to, table = plan.expert_to_slot(), plan.slot_table()
    assert to.shape == (case.ranks, plan.moe_layers, plan.experts)
    for layer in range(plan.moe_layers):
        assert (table[layer][to[:, layer]] == np.arange(plan.experts)).all()


@given(cases())
def test_a_rank_uses_its_own_copy_and_copies_share_the_sources_evenly(case):
    plan = solve(case.workload, case.cluster, slots_per_rank=case.slots, loads=case.loads)
    to, table, copies = plan.expert_to_slot(), plan.slot_table(), plan.copies()
    for at, rank in enumerate(plan.rank_ids):
        own = plan.slots_of(rank)
        for layer in range(plan.moe_layers):
            for expert in set(own[layer].tolist()) - {-1}:
                assert to[at, layer, expert] // plan.slots_per_rank == at
    for layer in range(plan.moe_layers):
        for expert in range(plan.experts):
            used = np.bincount(to[:, layer, expert], minlength=table.shape[1])[table[layer] == expert]
            assert used.max() - used.min() <= 1
            assert len(used) == copies[layer, expert]


def test_masking_takes_an_expert_out_of_every_slot():
    plan = with_masked(small(), [(1, 5)])
    plan.validate()
    assert plan.masked == ((1, 5),)
    assert plan.copies()[1, 5] == 0
    assert plan.copies()[0, 5] > 0
    assert (plan.expert_to_slot()[:, 1, 5] == -1).all()
    assert Plan.from_json(plan.to_json()) == plan


def test_slots_of_a_rank_are_its_part_of_the_table():
    plan = small()
    assert (np.concatenate([plan.slots_of(r) for r in plan.rank_ids], axis=1) == plan.slot_table()).all()
    with pytest.raises(KeyError, match="rank 9 holds no experts"):
        plan.slots_of(9)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: replace(p, ranks=p.ranks[::-1]), "ids must ascend"),
        (lambda p: replace(p, ranks=(replace(p.ranks[0], role="boss"), *p.ranks[1:])), "role 'boss'"),
        (lambda p: replace(p, ranks=p.ranks[:3]), "layer 0 has 12 slots; 3 ranks x 3 = 9"),
        (lambda p: replace(p, experts=7), "names expert 7; experts are 0..6"),
        (lambda p: replace(p, masked=((0, 1),)), r"masked but in a slot: \[\(0, 1\)\]"),
        (lambda p: replace(p, experts=9), r"without a slot and not masked: \[\(0, 8\), \(1, 8\)\]"),
        (lambda p: replace(p, slots_per_rank=0), "slots_per_rank 0"),
        (lambda p: replace(p, parity=(ParityGroup(layer=0, slot=12, members=(1,)),)), "layer 0 slot 12"),
        (lambda p: replace(p, parity=(ParityGroup(layer=0, slot=1, members=(1,)),)), "holds an expert"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(change, text):
    with pytest.raises(InvalidPlan, match=text):
        change(small()).validate()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a plan"),
        ("[]", "a JSON object is needed, got list"),
        ("{}", "KeyError 'epoch'"),
        (json.dumps({"epcoh": 1}), "unknown key 'epcoh' in plan. Did you mean 'epoch'"),
    ],
)
def test_what_is_no_plan_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)
