"""Laws of losses in pools: no stream waits for prompts, and what is left is never more than the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.cost.pools import design_pools
from planner.failures.loss_bands import pool_loss_bands
from planner.failures.loss_forecast import summarise
from planner.failures.pool_losses import forecast_pool_losses
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.inputs.traffic import Traffic


@pytest.fixture(scope="module")
def pooled():
    model = read_model("qwen3-30b-a3b")
    return design_pools(model, read_cluster("h100:6x2"), traffic=Traffic(prompt=8192)).deployment


def test_every_rank_and_host_of_both_pools_has_an_outcome(pooled):
    outcomes = forecast_pool_losses(pooled)
    bands = pool_loss_bands(pooled)

    def ranges(outcome):
        return bands[outcome.kind.split("_")[0]].of(outcome)

    rows = {row["kind"]: row["cases"] for row in summarise(outcomes, ranges)}
    ranks = sum(len(pool.plan.ranks) for pool in pooled.prefill)
    assert (rows["prefill_rank"], rows["decode_rank"]) == (ranks, len(pooled.decode.plan.ranks))
    for outcome in outcomes:
        assert 0 <= outcome.capacity <= 1
        if outcome.kind.startswith("prefill"):
            assert outcome.stall == 0
            assert outcome.moved_stall > 0
        else:
            assert outcome.moved_stall >= outcome.stall > 0


def test_the_other_prefill_instances_go_on_where_one_cannot_recover(pooled):
    several = replace(pooled, prefill=pooled.prefill[:1])
    for kept in (pooled, several):
        count = len(kept.prefill)
        lost = [o for o in forecast_pool_losses(kept, means=()) if o.kind == "prefill_host"]
        assert all(o.survivable for o in lost) or count == 1
