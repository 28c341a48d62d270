"""Laws of design: what it returns fits, survives what was asked, and more memory is never worse."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import InputError, NoFeasiblePlan, solve
from planner.cost.design import design
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.inputs.traffic import Traffic, read_traffic
from planner.plan.deployment import Deployment, FaultTolerance, read_fault_tolerance
from planner.plan.expert_loads import zipf_loads
from planner.solver.shapes import memory_budget, rest_bytes

MODELS = ["mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "olmoe-1b-7b"]


@settings(max_examples=8)
@given(
    st.sampled_from(MODELS),
    st.sampled_from(["h100", "h200:2x8", "v5p:4x4"]),
    st.integers(0, 3),
    st.sampled_from(["collocated", "disaggregated"]),
)
def test_the_chosen_plan_fits_and_survives_what_was_asked(name, where, lost, arch):
    model, cluster = read_model(name), read_cluster(where)
    found = design(model, cluster, survive=FaultTolerance(ranks=lost), arch=arch, loads=zipf_loads(model, 0.5))
    plan, shape = found.deployment.plan, found.chosen.shape
    plan.validate()
    used = rest_bytes(model, shape.tensor, shape.dense) + shape.slots * model.slot_bytes
    assert used <= memory_budget(cluster) or arch == "disaggregated"
    assert (len(plan.expert_ranks) - lost) * plan.slots_per_rank >= model.experts
    assert found.chosen is found.candidates[0]
    assert not found.chosen.reason
    assert Deployment.from_json(found.deployment.to_json()) == found.deployment
    assert all(c.reason or c.step for c in found.candidates)


@settings(max_examples=15)
@given(st.sampled_from(MODELS), st.integers(20, 200), st.integers(0, 100))
def test_more_memory_is_never_worse(name, gigabytes, more):
    model, cluster = read_model(name), read_cluster("h100")

    def best(size: int) -> float:
        roomy = replace(cluster, hardware=replace(cluster.hardware, memory_bytes=size * 10**9))
        try:
            return design(model, roomy).chosen.tokens_per_second
        except NoFeasiblePlan:
            return 0.0

    assert best(gigabytes + more) >= best(gigabytes) * (1 - 1e-9)


def test_deepseek_v3_on_forty_hosts_survives_a_host():
    model, cluster = read_model("deepseek-v3"), read_cluster("h200:40x8")
    found = design(model, cluster, survive=FaultTolerance(hosts=1), loads=zipf_loads(model, 0.8))
    plan = found.deployment.plan
    alive = [d.id for d in cluster.devices if d.host != "host7"]
    after = solve(model, cluster, alive=alive, previous=plan)
    assert after.slots_per_rank == plan.slots_per_rank


def test_disaggregated_ranks_have_one_role_each_and_only_expert_ranks_have_slots():
    model, cluster = read_model("deepseek-v3"), read_cluster("h200:8x8")
    plan = design(model, cluster, arch="disaggregated").deployment.plan
    roles = {r.role for r in plan.ranks}
    assert roles == {"attention", "expert"}
    assert {r.host for r in plan.expert_ranks}.isdisjoint(r.host for r in plan.ranks if r.role == "attention")
    assert plan.slot_table().shape == (58, len(plan.expert_ranks) * plan.slots_per_rank)
    assert plan.expert_to_slot().shape[0] == len(plan.attention_rank_ids)


def test_standby_ranks_hold_nothing():
    model, cluster = read_model("mixtral-8x7b"), read_cluster("h100")
    plan = design(model, cluster, standby=1).deployment.plan
    assert plan.ranks[-1].role == "standby"
    assert len(plan.expert_ranks) == 7


@pytest.mark.parametrize(
    ("model", "cluster", "text"),
    [
        ("deepseek-v3", "h100", "32 slots per rank need .* room for .* slots. Add ranks"),
        ("kimi-k2", "cpu", "Not even one slot"),
    ],
)
def test_what_is_missing_is_said(model, cluster, text):
    with pytest.raises(NoFeasiblePlan, match=text):
        design(read_model(model), read_cluster(cluster))


def test_asking_for_more_losses_than_there_are_ranks_is_infeasible():
    with pytest.raises(NoFeasiblePlan, match="no rank is left after losing 8 of 8"):
        design(read_model("mixtral-8x7b"), read_cluster("h100"), survive=FaultTolerance(hosts=1))


@pytest.mark.parametrize(
    ("model", "cluster", "survive", "more"),
    [
        ("llama-3.1-8b", "h100:1x1", FaultTolerance(), {}),
        ("llama-3.1-8b", "h100:2x1", FaultTolerance(hosts=2), {}),
        ("olmoe-1b-7b", "h100:1x8", FaultTolerance(hosts=1), {}),
        ("olmoe-1b-7b", "h100:1x8", FaultTolerance(ranks=3), {"slots": 10}),
        ("olmoe-1b-7b", "h100:2x8", FaultTolerance(racks=1), {}),
    ],
)
def test_the_losses_that_an_error_proposes_are_the_most_that_can_be_asked_for(model, cluster, survive, more):
    workload, there = read_model(model), read_cluster(cluster)
    with pytest.raises(NoFeasiblePlan, match=f"--survive {survive}: --survive ranks=") as error:
        design(workload, there, survive=survive, **more)
    most = int(str(error.value).rpartition("ranks=")[2].rstrip("."))
    assert design(workload, there, survive=FaultTolerance(ranks=most), **more).deployment.plan
    with pytest.raises(NoFeasiblePlan):
        design(workload, there, survive=FaultTolerance(ranks=most + 1), **more)


@pytest.mark.parametrize(("arch", "kinds"), [("disaggregated", 2), ("collocated", 1)])
def test_the_uses_of_memory_of_each_kind_of_device_fit_on_it(arch, kinds):
    cluster = read_cluster("v5e:4x8")
    found = design(read_model("qwen3-30b-a3b"), cluster, arch=arch)
    for candidate in (c for c in found.candidates if c.memory):
        devices = candidate.memory_by_device()
        assert len(devices) == kinds
        assert all(sum(size for _, size in uses) <= memory_budget(cluster) for uses in devices.values())
        assert sorted(use for uses in devices.values() for use in uses) == sorted(candidate.memory)


def test_options_are_read_and_wrong_ones_named():
    assert read_traffic("prompt=100, output=10,tpot_ms=12.5") == Traffic(prompt=100, output=10, tpot_ms=12.5)
    assert read_fault_tolerance("ranks=2,hosts=1") == FaultTolerance(ranks=2, hosts=1)
    assert FaultTolerance(ranks=2, hosts=1).most_lost(read_cluster("h200:4x8")) == 8
    for text, message in (
        ("promt=1", "Did you mean 'prompt'"),
        ("prompt=x", "is not prompt=NUMBER"),
        ("output=0", "above 0"),
    ):
        with pytest.raises(InputError, match=message):
            read_traffic(text)
    with pytest.raises(InputError, match="Did you mean 'hosts'"):
        read_fault_tolerance("host=1")
    with pytest.raises(InputError, match="4 standby ranks of 4"):
        design(read_model("olmoe-1b-7b"), read_cluster("cpu"), standby=4)
