"""Laws of the ranges of a loss: they hold their figure, and are narrower where phases were measured."""

from __future__ import annotations

from planner.cost.design import design
from planner.failures.loss_bands import loss_ranges
from planner.failures.loss_model import LossModel
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.inputs.recovery_times import RecoveryTimes


def test_a_range_holds_its_figure_and_measuring_makes_it_narrower():
    deployment = design(read_model("qwen3-30b-a3b"), read_cluster("h100:2x4")).deployment
    estimated = LossModel(deployment, RecoveryTimes())
    measured = LossModel(deployment, RecoveryTimes(source="measured"))
    widths = []
    for losses in (estimated, measured):
        outcome = losses.outcome({0})
        ranges = loss_ranges(losses, outcome)
        assert ranges["stall_ms"]["mid"] == outcome.stall * 1e3
        assert ranges["moved_stall_ms"]["mid"] == outcome.moved_stall * 1e3
        for each in ranges.values():
            assert each["low"] < each["mid"] < each["high"]
        widths.append(ranges["stall_ms"]["high"] / ranges["stall_ms"]["low"])
    assert widths[1] < widths[0]
