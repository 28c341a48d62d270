"""Laws of the ranges of a loss: they hold their figure, and are narrower where phases were measured."""

from __future__ import annotations

import pytest

from planner.cost.band import OWN, UNCHECKED
from planner.cost.design import design
from planner.cost.pools import design_pools
from planner.failures.loss_bands import LossBands, range_cells
from planner.failures.loss_model import LossModel
from planner.failures.pool_losses import PoolLossModel, forecast_pool_losses
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.inputs.recovery_times import RecoveryTimes


@pytest.fixture(scope="module")
def deployment():
    return design(read_model("qwen3-30b-a3b"), read_cluster("h100:2x4")).deployment


def test_a_range_holds_its_figure_and_measuring_makes_it_narrower(deployment):
    estimated = LossModel(deployment, RecoveryTimes())
    measured = LossModel(deployment, RecoveryTimes(source="measured", first_step=0.2))
    widths = []
    for losses in (estimated, measured):
        outcome, bands = losses.outcome({0}), LossBands(losses)
        ranges = bands.of(outcome)
        assert ranges["stall_ms"]["mid"] == outcome.stall * 1e3
        assert ranges["moved_stall_ms"]["mid"] == outcome.moved_stall * 1e3
        assert ranges["capacity"]["mid"] == outcome.capacity
        for each in ranges.values():
            assert each["low"] < each["mid"] < each["high"]
        assert ranges["capacity"]["low"] >= 0
        assert ranges["capacity"]["high"] <= 1
        widths.append(ranges["stall_ms"]["high"] / ranges["stall_ms"]["low"])
    assert widths[1] < widths[0]


def test_each_phase_is_off_by_its_own_factor(deployment):
    bands = LossBands(LossModel(deployment, RecoveryTimes()))
    phases = {"detect": 1.0, "messages": 1.0, "weights": 0.0, "step": 0.0}
    assert bands.stall(phases) == (1 / UNCHECKED + 1 / OWN, 2.0, UNCHECKED + OWN)
    assert bands.around({}, 0.0, 1.0)["capacity"] == {"low": 1.0, "mid": 1.0, "high": 1.0}
    assert "estimated phases" in bands.source()


def test_a_loss_that_is_not_survivable_has_no_range(deployment):
    losses = LossModel(deployment)
    everyone = losses.outcome(deployment.plan.rank_ids)
    assert not everyone.survivable
    assert range_cells(LossBands(losses).of(everyone)) == ("-", "-", "-")


def test_losses_of_pools_are_outside_of_what_was_measured():
    pooled = design_pools(read_model("qwen3-30b-a3b"), read_cluster("h100:4x2")).deployment
    losses = PoolLossModel(pooled)
    for name, each in PoolLossModel(pooled, RecoveryTimes(source="measured", first_step=0.2)).bands.items():
        assert each.measured
        assert each.factors["detect"] == OWN < losses.bands[name].factors["detect"]
    assert all("pools" in each.source() for each in losses.bands.values())
    for outcome in forecast_pool_losses(losses, kinds=["rank"]):
        ranges = losses.ranges(outcome)
        assert ranges["moved_stall_ms"]["high"] >= 1.5 * ranges["moved_stall_ms"]["mid"]
