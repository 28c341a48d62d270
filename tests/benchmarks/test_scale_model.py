"""Laws of the model of scale: agreement with the planner's own figures, and directions that must hold."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scale_model import (
    ScaledStep,
    lost_experts,
    scaled_recovery,
    shared_recovery,
    shared_step,
    weights_seconds,
)
from planner import solve
from planner.cost.front import CostCurve, FrontCost, most_ranks
from planner.cost.roofline import step_time
from planner.failures.loss_model import LossModel
from planner.failures.survivors import survivors
from planner.inputs.cluster import Cluster, read_cluster
from planner.inputs.published import read_model
from planner.inputs.recovery_times import RecoveryTimes
from planner.plan.deployment import Deployment
from planner.plan.shape import Shape

MODEL = read_model("deepseek-v3")
HARDWARE = read_cluster("h200").hardware
FRONT = FrontCost(
    step=CostCurve(fixed=1e-3, each=2e-4),
    row=5e-5,
    abort=CostCurve(fixed=1e-4, each=3e-5),
    prepare=CostCurve(fixed=1e-3, each=1e-4, pair=1e-8),
    adopt=CostCurve(fixed=1e-3, each=2e-4, pair=1e-8),
    beat=3e-5,
    look=5e-6,
    beat_s=0.05,
    look_s=0.01,
    look_many_s=0.05,
    many_ranks=10_000,
)
lines = st.builds(CostCurve, fixed=st.floats(0, 1), each=st.floats(0, 1), pair=st.floats(0, 1))
ranks = st.integers(2, 300)


def cluster(n: int) -> Cluster:
    return Cluster.regular("c", -(-n // 8), min(8, n), hardware=HARDWARE)


def shape(n: int, slots: int) -> Shape:
    roles, groups = ("collocated",) * n, tuple(range(n))
    return Shape(arch="collocated", tensor=1, dense=1, slots=slots, roles=roles, groups=groups)


def recovered(n: int, slots: int, front: FrontCost = FRONT, **more: float):
    return scaled_recovery(MODEL, cluster(n), shape(n, slots), front, RecoveryTimes(), step=0.05, **more)


def test_a_line_is_its_three_terms():
    assert CostCurve(fixed=1.0, each=2.0, pair=3.0).at(10) == 1 + 20 + 300


@given(line=lines, n=st.integers(0, 10_000))
def test_a_line_never_falls(line: CostCurve, n: int):
    assert line.at(n) <= line.at(n + 1)


@given(n=st.integers(1, 5000), rows=st.integers(0, 10**6))
def test_a_fronts_step_grows_with_ranks_and_with_tokens(n: int, rows: int):
    assert FRONT.step_seconds(n, rows) <= FRONT.step_seconds(n + 1, rows)
    assert FRONT.step_seconds(n, rows) <= FRONT.step_seconds(n, rows + 1)


def test_a_front_that_only_watches_has_no_time_for_steps():
    each = FRONT.watch_share(1)
    assert each == pytest.approx(3e-5 / 0.05 + 5e-6 / 0.01)
    assert FRONT.step_seconds(int(0.999 / each), 0) < inf
    assert FRONT.step_seconds(int(1.01 / each), 0) == inf


@given(n=st.integers(1, 400))
def test_preparing_every_single_loss_grows_faster_than_the_ranks(n: int):
    assert FRONT.preparing(n + 1, n + 1) >= FRONT.preparing(n, n) * (n + 1) / n


@given(n=ranks, tokens=st.integers(1, 256))
def test_ranks_need_what_the_planner_says_and_a_front_that_costs_nothing_adds_nothing(n: int, tokens: int):
    step = step_time(MODEL, cluster(n), shape(n, -(-256 // n)), tokens, 2000)
    free = ScaledStep(ranks=step, front=FrontCost().step_seconds(n, n * tokens))
    assert free.ahead == free.in_turn == step.total
    real = ScaledStep(ranks=step, front=FRONT.step_seconds(n, n * tokens))
    assert step.total <= real.ahead <= real.in_turn == pytest.approx(step.total * (1 + real.share))


@given(n=ranks)
def test_a_recovery_grows_with_ranks_by_the_fronts_rounds_alone(n: int):
    slots = -(-2 * 256 // n) + 1
    small, large = recovered(n, slots), recovered(n + 1, slots)
    assert small.abort_messages <= large.abort_messages
    assert small.adopt_messages <= large.adopt_messages
    assert large.stall - small.stall == pytest.approx(
        large.abort_messages + large.adopt_messages - small.abort_messages - small.adopt_messages
    )


@given(n=ranks, requests=st.integers(0, 500))
def test_streams_of_the_dead_rank_wait_for_their_replay_besides(n: int, requests: int):
    t = recovered(n, -(-2 * 256 // n) + 1, requests=requests, prefill=0.1)
    assert t.moved_stall == pytest.approx(t.stall + t.replay)
    assert t.replay == pytest.approx(0.1 * -(-requests // (n - 1)))


@pytest.mark.parametrize(("n", "slots"), [(8, 40), (16, 20), (32, 9), (64, 8), (32, 16)])
def test_a_recovery_of_this_page_is_the_planners(n: int, slots: int):
    where = cluster(n)
    plan = solve(MODEL, where, slots_per_rank=slots, survive_ranks=1)
    losses = LossModel(Deployment(plan=plan, workload=MODEL, cluster=where))
    outcome = losses.outcome((0,))
    front = FrontCost.measured(MODEL).unwatched()
    t = recovered(n, slots, front)
    assert (t.detect, t.abort, t.adopt) == tuple(outcome.phases[name] for name in ("detect", "abort", "adopt"))
    assert t.abort_messages + t.adopt_messages == pytest.approx(outcome.phases["messages"])
    assert lost_experts(MODEL, shape(n, slots)) == outcome.means.get("store", 0)
    assert t.weights == pytest.approx(outcome.phases["weights"], rel=0.1)
    left = losses.capacity_model.predict(survivors(losses.deployment, {0}, losses.capacity_model), slots)
    requests = losses.capacity_model.whole.requests_per_group * (n - 1)
    assert outcome.phases["step"] == pytest.approx(left.step.total + front.step_seconds(n - 1, requests))


@given(n=ranks, slots=st.integers(1, 64))
def test_more_slots_never_mean_more_to_load(n: int, slots: int):
    if n * slots >= 256:
        before = weights_seconds(MODEL, cluster(n), shape(n, slots))
        assert weights_seconds(MODEL, cluster(n), shape(n, slots + 1)) <= before


def test_with_two_copies_of_every_expert_nothing_is_loaded():
    assert weights_seconds(MODEL, cluster(64), shape(64, 8)) == 0
    assert lost_experts(MODEL, shape(64, 4)) == 4 * 58


def test_ranks_that_share_cores_take_turns():
    step = step_time(MODEL, cluster(4), shape(4, 64), 2, 100)
    work = step.total - step.exchange
    assert shared_step(step, 0.0, 0.0, 4, 4) == pytest.approx(work + step.exchange)
    assert shared_step(step, 0.0, 0.0, 4, 2) == pytest.approx(2 * work + step.exchange)
    assert shared_step(step, 0.25, 0.5, 4, 2) == pytest.approx(2 * work + 0.375 + step.exchange)
    assert shared_step(step, 0.0, 0.0, 4, 2, factor=3.0) == pytest.approx(6 * work + step.exchange)
    alone = replace(step, exchange=0.0)
    assert shared_step(alone, 0.0, 0.0, 1, 2) == pytest.approx(work / 2)


def test_survivors_that_share_cores_recover_in_turn():
    assert shared_recovery(0.01, 0.002, 0.005, 2, 2) == pytest.approx(0.017)
    assert shared_recovery(0.01, 0.002, 0.005, 6, 2) == pytest.approx(0.037)


@given(limit=st.integers(0, 1 << 20))
def test_the_most_ranks_are_the_last_that_fit(limit: int):
    assert most_ranks(lambda n: n <= limit) == limit
