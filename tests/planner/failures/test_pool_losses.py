"""Laws of losses in pools: either side bears its own losses, both are never better than one, and roles switch."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from planner.cost.pools import design_pools, with_figures
from planner.failures.loss_forecast import summarise
from planner.failures.loss_model import MEANS, LossModel
from planner.failures.pool_losses import PoolLossModel, forecast_pool_losses
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.inputs.traffic import Traffic


@pytest.fixture(scope="module")
def losses():
    model = read_model("qwen3-30b-a3b")
    return PoolLossModel(design_pools(model, read_cluster("h100:6x2"), traffic=Traffic(prompt=8192)).deployment)


def ranks_of(losses: PoolLossModel) -> tuple[list[int], list[int]]:
    """The ranks that compute prompts, and the ranks that decode."""
    decode = list(losses.decode.deployment.plan.rank_ids)
    return [rank for rank in losses.pool_of if rank not in decode], decode


def test_the_rates_are_the_figures_of_the_plan(losses):
    pooled = losses.deployment
    for name, value in (
        ("requests_per_second", losses.rates.rate),
        ("requests_per_second_of_prompts", losses.rates.prompts),
        ("requests_per_second_of_decode", losses.rates.decode),
        ("ttft", losses.rates.ttft),
    ):
        assert value == pytest.approx(pooled.figure(name))
    assert with_figures(replace(pooled, figures=())).figures == pooled.figures


def test_every_rank_and_host_of_both_pools_has_an_outcome(losses):
    outcomes = forecast_pool_losses(losses)
    rows = {row["kind"]: row["cases"] for row in summarise(outcomes, losses.ranges)}
    prefill, decode = ranks_of(losses)
    assert (rows["prefill_rank"], rows["decode_rank"]) == (len(prefill), len(decode))
    assert rows["prefill_host"] + rows["decode_host"] == 6
    for outcome in outcomes:
        assert 0 <= outcome.capacity <= 1
        if outcome.kind.startswith("prefill"):
            assert outcome.stall == 0
            assert outcome.moved_stall > 0
        else:
            assert outcome.moved_stall >= outcome.stall > 0


def test_each_side_recovers_as_a_mesh_of_its_own_does(losses):
    for at, each in enumerate(losses.pools):
        alone = LossModel(each.deployment)
        for dead in combinations(each.deployment.plan.rank_ids[:3], 2):
            one, joint = alone.outcome(dead), losses.outcome(dead)
            left = losses.after(dead)
            if at == len(losses.pools) - 1:
                assert joint.phases == one.phases
                assert left.shares[0].capacity == pytest.approx(
                    min(1.0, one.capacity * losses.rates.decode / losses.rates.rate)
                )
            assert (joint.bytes_moved, joint.cache_tokens) == (one.bytes_moved, one.cache_tokens)


def test_a_loss_on_both_sides_is_no_better_than_either_alone(losses):
    prefill, decode = ranks_of(losses)
    for a, b in ((prefill[:1], decode[:1]), (prefill[:2], decode[-1:]), (prefill[-1:], decode[:2])):
        one, other, both = losses.outcome(a), losses.outcome(b), losses.outcome([*a, *b])
        assert both.kind == "both_rank"
        assert both.phases == other.phases
        assert both.moved_stall >= max(one.moved_stall, other.moved_stall)
        assert both.capacity == pytest.approx(min(one.capacity, other.capacity))
        ends = losses.ranges(both)
        for outcome in (one, other):
            ranges = losses.ranges(outcome)
            assert ends["moved_stall_ms"]["high"] >= ranges["moved_stall_ms"]["high"]
            assert ends["capacity"]["low"] <= ranges["capacity"]["low"]


def test_the_other_prefill_instances_go_on_where_one_cannot_recover():
    model = read_model("deepseek-v3")
    pooled = design_pools(model, read_cluster("h100:12x8")).deployment
    losses = PoolLossModel(pooled, means=())
    assert len(losses.prefill) == 2
    first = losses.prefill[0].deployment.plan.rank_ids
    half = losses.outcome(first)
    assert half.survivable
    assert "switch" not in half.means
    assert half.stall == 0
    assert losses.after(tuple(sorted(first))).shares[1].capacity == pytest.approx(
        min(1.0, losses.rates.prompts / 2 / losses.rates.rate)
    )


@pytest.mark.parametrize("side", [0, 1])
def test_roles_switch_when_a_side_is_lost_whole(losses, side):
    dead = ranks_of(losses)[side]
    other = ranks_of(losses)[1 - side]
    found = losses.outcome(dead)
    assert found.survivable
    assert found.means["switch"] == len(other)
    assert 0 < found.capacity < 1
    assert (found.stall > 0) == (side == 1), "streams of ranks that decode wait, and no others"
    assert found.moved_stall >= max(found.stall, 1e-3)
    kept = PoolLossModel(losses.deployment, means=[each for each in MEANS if each != "switch"])
    refused = kept.outcome(dead)
    assert not refused.survivable
    assert "roles do not switch" in refused.reason
    everyone = losses.outcome([*dead, *other])
    assert not everyone.survivable
    assert "neither side serves" in everyone.reason


def test_a_token_takes_longer_where_the_ranks_compute_prompts_too(losses):
    prefill, _ = ranks_of(losses)
    whole = losses.decode.capacity_model.whole
    requests = whole.requests_per_group * whole.shape.data // 2
    before, after = losses.after(()), losses.after(tuple(sorted(prefill)))
    assert before.tpot_ms(requests)["mid"] < after.tpot_ms(requests)["mid"]
