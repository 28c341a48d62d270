"""Laws of simulate: time adds up, the same seed is the same, and no policy beats a faultless cluster."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import Cluster, Hardware, InputError, Workload, solve
from planner.cost.design import design
from planner.cost.recovery_model import RecoveryModel
from planner.failures.simulate import POLICIES, simulate
from planner.failures.timeline import FailureEvent, timeline
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.inputs.recovery_times import RecoveryTimes
from planner.plan.deployment import Deployment


def small(slots: int = 4, standby: int = 0) -> Deployment:
    workload = Workload(moe_layers=2, experts=8, experts_per_token=2, expert_bytes=100)
    cluster = Cluster.regular("c", 4, 1, hardware=Hardware())
    roles = {3 - i: "standby" for i in range(standby)}
    plan = solve(workload, cluster, slots_per_rank=slots, roles=roles)
    return Deployment(plan=plan, workload=workload, cluster=cluster)


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
    model = RecoveryModel.of(small().workload, fixed)
    stall = 1 + 2 + 3 + 10 + model.messages(3) + model.first_step(3, 0, 0.0)
    assert 16 < stall < 16.1
    assert by["mask"].stall_seconds == pytest.approx(stall)
    assert by["copy"].stall_seconds == pytest.approx(stall)
    assert by["copy"].reduced_hours == pytest.approx(24)
    assert by["copy"].goodput_lost == pytest.approx((24 * 0.25 + stall / 3600) / 240)
    assert by["copy"].degraded_hours == by["mask"].degraded_hours == 0


def test_masked_hours_count_only_where_single_copies_died():
    events = [FailureEvent(hour=24, ids=(1,), up=False), FailureEvent(hour=48, ids=(1,), up=True)]
    accounts = {a.policy: a for a in simulate(small(slots=3), events, days=10, policies=("mask", "copy"))}
    assert accounts["mask"].degraded_hours == pytest.approx(24)
    assert accounts["copy"].degraded_hours == 0
    assert accounts["copy"].store_bytes > 0


def test_too_few_slots_are_an_outage_until_a_rank_is_back():
    events = [FailureEvent(hour=10, ids=(0,), up=False), FailureEvent(hour=12, ids=(0,), up=True)]
    (account,) = simulate(small(slots=2), events, days=1, policies=("copy",))
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
        assert a.outage_hours + a.reduced_hours <= 30 * 24 + 1e-6
    assert accounts == simulate(d, events, days=30)


def test_role_switch_is_compared_where_attention_is_apart():
    d = design(read_model("qwen3-30b-a3b"), read_cluster("h100:4x8"), arch="disaggregated").deployment
    events = timeline(d, days=400, seed=3)
    assert [a.policy for a in simulate(d, events, days=400)] == list(POLICIES)


def test_wrong_policies_and_times_are_named():
    with pytest.raises(InputError, match="unknown key 'pray' in --policies"):
        simulate(small(), [], days=1, policies=("pray",))
    with pytest.raises(InputError, match="above 0"):
        timeline(small(), days=0)
