"""Laws of simulate: time adds up, the same seed is the same, and no policy beats a faultless cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import Cluster, Hardware, InputError, Workload, solve
from planner.cost.design import design
from planner.cost.pools import design_pools
from planner.failures.certificate import ServiceLevels, Terms, certify
from planner.failures.loss_model import MEANS, LossModel
from planner.failures.pool_losses import PoolLossModel
from planner.failures.simulate import POLICIES, simulate
from planner.failures.timeline import FailureEvent, timeline
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.inputs.recovery_times import RecoveryTimes
from planner.inputs.traffic import Traffic
from planner.plan.deployment import Deployment, FaultTolerance
from planner.plan.pools import PooledDeployment


def small(slots: int = 4, standby: int = 0) -> Deployment:
    workload = Workload(moe_layers=2, experts=8, experts_per_token=2, expert_bytes=100)
    cluster = Cluster.regular("c", 4, 1, hardware=Hardware())
    roles = {3 - i: "standby" for i in range(standby)}
    plan = solve(workload, cluster, slots_per_rank=slots, roles=roles)
    return Deployment(plan=plan, workload=workload, cluster=cluster)


def pools() -> PooledDeployment:
    model = read_model("qwen3-30b-a3b")
    return design_pools(model, read_cluster("h100:4x2"), traffic=Traffic(prompt=8192)).deployment


def test_without_failures_nothing_is_lost():
    for account in simulate(small(), [], days=10, policies=("restart", "mask", "copy")):
        assert account.availability == 1
        assert account.goodput_lost == 0
        assert account.failures == 0


def test_one_failure_can_be_worked_out_by_hand():
    events = [FailureEvent(hour=24, ids=(1,), up=False), FailureEvent(hour=48, ids=(1,), up=True)]
    fixed = RecoveryTimes(detect=1, abort=2, adopt=3, restart=100, rejoin=10)
    accounts = simulate(small(), events, days=10, policies=("restart", "mask", "copy"), recovery=fixed)
    by = {a.policy: a for a in accounts}
    assert by["restart"].stall_seconds == pytest.approx(1 + 100 + 100)
    outcome = LossModel(small(), fixed).outcome({1})
    stall = 1 + 2 + 3 + 10 + outcome.phases["messages"] + outcome.phases["step"]
    assert 16 < stall < 17
    assert by["mask"].stall_seconds == pytest.approx(stall)
    assert by["copy"].stall_seconds == pytest.approx(stall)
    assert by["copy"].reduced_hours == pytest.approx(24)
    assert by["copy"].goodput_lost == pytest.approx((24 * (1 - outcome.capacity) + stall / 3600) / 240)
    assert by["copy"].degraded_hours == by["mask"].degraded_hours == 0


def test_masked_hours_count_only_where_single_copies_died():
    events = [FailureEvent(hour=24, ids=(1,), up=False), FailureEvent(hour=48, ids=(1,), up=True)]
    accounts = {a.policy: a for a in simulate(small(slots=3), events, days=10, policies=("mask", "copy"))}
    assert accounts["mask"].degraded_hours == pytest.approx(24)
    assert accounts["copy"].degraded_hours == 0
    assert accounts["copy"].store_bytes > 0


@pytest.mark.parametrize("without", [(), ("regrow",), ("store",)])
def test_slots_grow_on_the_ranks_left_as_degrade_and_certify_let_them(without):
    """Eight experts in four times two slots: three ranks need three slots each."""
    d = small(slots=2)
    events = [FailureEvent(hour=10, ids=(0,), up=False), FailureEvent(hour=12, ids=(0,), up=True)]
    (account,) = simulate(d, events, days=1, policies=("copy",), without=without)
    losses = LossModel(d, means=[each for each in MEANS if each not in (*without, "mask")])
    outcome = losses.outcome({0})
    terms = Terms(survive=FaultTolerance(ranks=1), levels=ServiceLevels(capacity=0.01), requests=1)
    assert outcome.survivable == certify(losses, terms).holds == (not without)
    assert account.outage_hours == pytest.approx(0 if outcome.survivable else 2)
    stall = (outcome.stall + RecoveryTimes().rejoin) if outcome.survivable else RecoveryTimes().rejoin
    assert account.stall_seconds == pytest.approx(stall)
    assert account.availability == pytest.approx(1 - (account.outage_hours + stall / 3600) / 24)
    assert account.reduced_hours == pytest.approx(2 if outcome.survivable and outcome.capacity < 1 else 0)


def test_too_little_memory_for_more_slots_is_an_outage():
    d = small(slots=2)
    tight = replace(d, cluster=replace(d.cluster, hardware=Hardware(memory_bytes=2 * d.workload.slot_bytes * 10 // 9)))
    events = [FailureEvent(hour=10, ids=(0,), up=False), FailureEvent(hour=12, ids=(0,), up=True)]
    (account,) = simulate(tight, events, days=1, policies=("copy",))
    assert not LossModel(tight, means=MEANS[:-1]).outcome({0}).survivable
    assert account.outage_hours == pytest.approx(2)


def test_a_host_and_its_rank_failing_together_come_back_when_both_are_repaired():
    events = [
        FailureEvent(hour=1, ids=(0,), up=False),
        FailureEvent(hour=2, ids=(0,), up=False),
        FailureEvent(hour=3, ids=(0,), up=True),
        FailureEvent(hour=5, ids=(0,), up=True),
    ]
    (account,) = simulate(small(), events, days=1, policies=("copy",))
    assert account.reduced_hours == pytest.approx(4)
    assert account.failures == 1


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(20, 2000), st.floats(0.1, 50))
def test_shares_are_shares_and_the_seed_decides(seed, mtbf, repair):
    d = small(slots=3)
    events = timeline(d, days=30, mtbf_hours=mtbf, repair_hours=repair, seed=seed)
    assert events == timeline(d, days=30, mtbf_hours=mtbf, repair_hours=repair, seed=seed)
    assert [e.hour for e in events] == sorted(e.hour for e in events)
    accounts = simulate(d, events, days=30)
    assert [a.policy for a in accounts] == ["restart", "mask", "copy", "spare"]
    for a in accounts:
        assert 0 <= a.availability <= 1
        assert a.goodput_lost >= 0
        assert 0 <= a.goodput_low <= a.goodput_lost + 1e-12
        assert a.goodput_lost <= a.goodput_high + 1e-12 <= 1 + 1e-12
        assert a.outage_hours + a.reduced_hours <= 30 * 24 + 1e-6
    assert accounts == simulate(d, events, days=30)


def test_pools_have_a_result_for_either_side_and_roles_switch():
    pooled = design_pools(
        read_model("qwen3-30b-a3b"), read_cluster("h100:4x2"), traffic=Traffic(prompt=8192)
    ).deployment
    decode = pooled.decode.plan.rank_ids
    events = [FailureEvent(hour=10, ids=decode, up=False), FailureEvent(hour=14, ids=decode, up=True)]
    results = {(a.side, a.policy): a for a in simulate(pooled, events, days=2)}
    policies = ("restart", "mask", "copy", "switch")
    assert list(results) == [(side, p) for p in policies for side in ("together", "prefill", "decode")]
    for policy, out in (("copy", 4), ("switch", 0)):
        assert results["together", policy].outage_hours == pytest.approx(out)
        assert results["together", policy].switched_hours == pytest.approx(4 - out)
        assert results["decode", policy].outage_hours == pytest.approx(4), "of its own work"
        assert results["prefill", policy].outage_hours == 0
    assert results["together", "switch"].availability > results["together", "copy"].availability
    assert results["prefill", "switch"].failures == 0
    assert results["decode", "switch"].failures == results["together", "switch"].failures == 1
    losses = PoolLossModel(pooled, means=MEANS[:-1])
    rejoin = losses.recovery.times.rejoin
    assert results["together", "switch"].stall_seconds == pytest.approx(losses.outcome(decode).stall + rejoin)
    with pytest.raises(InputError, match="no rank stands by in pools"):
        simulate(pooled, [], days=1, policies=("spare",))


def test_the_timeline_of_pools_is_of_their_ranks_and_hosts():
    pooled = design_pools(
        read_model("qwen3-30b-a3b"), read_cluster("h100:4x2"), traffic=Traffic(prompt=8192)
    ).deployment
    events = timeline(pooled, days=2000, mtbf_hours=1000, host_mtbf_hours=1000, repair_hours=5, seed=1)
    assert {event.ids for event in events} == {*((i,) for i in range(8)), *((i, i + 1) for i in range(0, 8, 2))}


def test_role_switch_is_compared_where_attention_is_apart():
    d = design(read_model("qwen3-30b-a3b"), read_cluster("h100:4x8"), arch="disaggregated").deployment
    events = timeline(d, days=400, seed=3)
    assert [a.policy for a in simulate(d, events, days=400)] == list(POLICIES)


def test_wrong_policies_and_times_are_named():
    with pytest.raises(InputError, match="unknown key 'pray' in --policies"):
        simulate(small(), [], days=1, policies=("pray",))
    with pytest.raises(InputError, match="above 0"):
        timeline(small(), days=0)
