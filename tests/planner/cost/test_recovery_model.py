"""Laws of the model of a recovery: it grows with the ranks, slower stores take longer, and measured phases stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import Hardware, InputError
from planner.cost.design import design
from planner.cost.recovery_model import PHASES, RecoveryModel, store_seconds
from planner.failures.loss_model import LossModel
from planner.inputs.cluster import STORES, read_cluster
from planner.inputs.published import read_model
from planner.inputs.recovery_times import RecoveryTimes
from planner.plan.deployment import Deployment, FaultTolerance

MODEL = read_model("olmoe-1b-7b")
ranks = st.integers(1, 3000)
sizes = st.floats(0, 1e12)


def phases(left: int, times: RecoveryTimes | None = None) -> dict[str, float]:
    return RecoveryModel.of(MODEL, times).phases(left, weights=0.0, requests=8 * left, ranks_step=0.02)


@given(ranks)
def test_a_recovery_on_more_ranks_takes_longer_by_messages_and_the_first_step(left: int):
    a, b = phases(left), phases(left + 1)
    assert tuple(a) == PHASES
    assert all(a[name] == b[name] for name in ("detect", "abort", "adopt", "weights"))
    assert a["messages"] < b["messages"]
    assert 0.02 < a["step"] < b["step"]


@given(ranks, ranks)
def test_phases_measured_on_as_many_ranks_hold_their_messages_and_first_step(measured: int, left: int):
    times = RecoveryTimes(detect=0.01, abort=0.02, adopt=0.03, first_step=0.04, ranks=measured, source="measured")
    found = phases(left, times)
    assert found["step"] == 0.04
    assert (found["messages"] > 0) == (left > measured)
    grown = RecoveryModel.of(MODEL).messages(left) - RecoveryModel.of(MODEL).messages(measured)
    assert found["messages"] == pytest.approx(max(0.0, grown))


@given(sizes, sizes, sizes)
def test_no_store_is_quicker_than_the_hosts_memory_and_more_bytes_never_are(
    rank: float, host: float, everywhere: float
):
    memory, disk, network = (
        store_seconds(replace(Hardware(), store=store), rank, host, everywhere) for store in STORES
    )
    assert memory <= min(disk, network)
    for store in STORES:
        hardware = replace(Hardware(), store=store)
        twice = store_seconds(hardware, 2 * rank, 2 * host, 2 * everywhere)
        assert twice == pytest.approx(2 * store_seconds(hardware, rank, host, everywhere))


def test_an_unknown_store_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'disk'"):
        Hardware(store="disc")


def test_a_loss_waits_for_the_store_that_the_cluster_names():
    d = design(MODEL, read_cluster("h100:2x8"), slots=4, survive=FaultTolerance(ranks=0)).deployment
    stalls = []
    for store in STORES:
        cluster = replace(d.cluster, hardware=replace(d.cluster.hardware, store=store))
        outcome = LossModel(replace(d, cluster=cluster)).outcome({0})
        assert outcome.means["store"]
        stalls.append(outcome.phases["weights"])
    assert stalls[0] < stalls[1]
    assert stalls[0] < stalls[2]


def test_a_plan_file_carries_the_recoveries_of_its_server():
    times = RecoveryTimes(detect=0.5, abort=0.02, adopt=0.03, first_step=0.04, ranks=15, source="measured")
    d = replace(design(MODEL, read_cluster("h100:2x8")).deployment, recovery=times)
    again = Deployment.from_json(d.to_json())
    assert again == d
    outcome = LossModel(again).outcome({0})
    assert (outcome.phases["detect"], outcome.phases["step"], outcome.phases["messages"]) == (0.5, 0.04, 0.0)
    assert LossModel(again, RecoveryTimes()).outcome({0}).phases["detect"] == RecoveryTimes().detect
