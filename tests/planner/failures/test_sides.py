"""Laws of plans while failures pass: what is left is as if all dead ranks had died at once, and what a loss costs is
what `degrade` says of it."""

from __future__ import annotations

from functools import cache
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import Cluster, Hardware, Workload, solve
from planner.cost.design import design
from planner.cost.pools import design_pools
from planner.failures.loss_bands import LossBands
from planner.failures.loss_model import MEANS, LossModel
from planner.failures.mesh_state import MeshState
from planner.failures.pool_losses import PoolLossModel
from planner.failures.sides import DECODE, PREFILL, TOGETHER, MeshSides, PoolSides
from planner.failures.simulate import MEANS_OF, with_spares
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.inputs.traffic import Traffic
from planner.plan.deployment import Deployment, FaultTolerance

UNMASKED = tuple(each for each in MEANS if each != "mask")
PLANS = ("collocated", "thin", "disaggregated", "tensor", "standby", "toy")


@cache
def deployment(name: str) -> Deployment:
    model, cluster = read_model("qwen3-30b-a3b"), read_cluster("h100:3x4")
    if name == "toy":
        workload = Workload(moe_layers=2, experts=9, experts_per_token=2, expert_bytes=100)
        small = Cluster.regular("c", 3, 2, hardware=Hardware())
        return Deployment(plan=solve(workload, small, slots_per_rank=2), workload=workload, cluster=small)
    options = {
        "collocated": {"tensor": 1},
        "thin": {
            "tensor": 1,
            "slots": 11,
            "survive": FaultTolerance(ranks=0),
        },  # 132 slots for 128 experts: the loss of a rank leaves too few
        "disaggregated": {"arch": "disaggregated", "tensor": 1},
        "tensor": {"tensor": 2},
        "standby": {"tensor": 1, "standby": 2},
    }[name]
    return design(model, cluster, **options).deployment


@cache
def losses_of(name: str, means: tuple[str, ...] = UNMASKED) -> LossModel:
    return LossModel(deployment(name), means=means)


@cache
def pools() -> PoolLossModel:
    model = read_model("qwen3-30b-a3b")
    return PoolLossModel(
        design_pools(model, read_cluster("h100:4x2"), traffic=Traffic(prompt=8192)).deployment, means=UNMASKED
    )


def steps(ranks: int):
    """Losses (True) and repairs (False) of some ranks, by their positions."""
    some = st.lists(st.integers(0, ranks - 1), min_size=1, max_size=4, unique=True)
    return st.lists(st.tuples(st.booleans(), some), max_size=8)


def as_at_once(losses: LossModel | PoolLossModel, dead: frozenset[int]) -> float:
    if not dead:
        return 1.0
    outcome = losses.outcome(dead)
    return outcome.capacity if outcome.survivable else 0.0


@settings(max_examples=20)
@given(st.sampled_from(PLANS), st.data())
def test_whatever_comes_and_goes_a_mesh_serves_as_if_its_dead_ranks_had_died_at_once(name, data):
    losses = losses_of(name)
    ids = losses.deployment.plan.rank_ids
    state = MeshState(losses)
    for lost, some in data.draw(steps(len(ids))):
        ranks = [ids[at] for at in some]
        state.lose(ranks) if lost else state.restore(ranks)
        assert state.capacity == as_at_once(losses, state.dead)
        left = losses.left(state.dead)
        assert (state.slots, state.refused) == losses.slots_after(left)
        if not state.refused:
            assert list(state.held.ranks) == losses.expert_ranks(left, state.dead)
            assert state.held.table.shape[2] == state.slots
            assert not state.masked
    state.restore(ids)
    assert state.capacity == 1
    assert (np.sort(state.held.copies, axis=None) > 0).all()


@settings(max_examples=20)
@given(st.sampled_from(PLANS), st.data())
def test_the_first_loss_costs_what_degrade_says(name, data):
    losses = losses_of(name)
    ids = losses.deployment.plan.rank_ids
    dead = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=5, unique=True))
    outcome = losses.outcome(dead)
    cost = MeshSides(losses, LossBands(losses)).lose(dead)[TOGETHER]
    if outcome.survivable:
        assert cost.phases == outcome.phases
        assert cost.tokens == outcome.cache_tokens
    else:
        assert not cost.phases


@settings(max_examples=20)
@given(st.sampled_from(PLANS), st.data())
def test_two_losses_one_after_the_other_take_at_most_what_each_takes_of_the_ranks_that_load(name, data):
    """Of the second loss only what is new counts: its tokens, its switched roles, its weights."""
    losses = losses_of(name)
    ids = losses.deployment.plan.rank_ids
    first, second = data.draw(st.lists(st.sampled_from(ids), min_size=2, max_size=2, unique=True))
    state = MeshState(losses)
    one, other, both = state.lose([first]), state.lose([second]), losses.outcome([first, second])
    if both.survivable and one.survivable:
        assert other.survivable
        assert one.cache_tokens + other.cache_tokens == pytest.approx(both.cache_tokens, abs=1)
        assert one.means.get("switch", 0) + other.means.get("switch", 0) == both.means.get("switch", 0)
        assert other.phases["messages"] == both.phases["messages"]
        again = state.lose([])
        assert (again.bytes_moved, again.cache_tokens) == (0, 0)


def test_masked_experts_stay_masked_until_a_rank_with_them_is_back():
    losses = losses_of("thin", tuple(MEANS_OF["mask"]))
    state, (first, second) = MeshState(losses), losses.deployment.plan.expert_rank_ids[:2]
    assert not state.lose([first]).means.get("store")
    assert state.masked
    assert state.capacity > 0
    state.lose([second])
    state.restore([second])
    assert state.masked
    state.restore([first])
    assert not state.masked


def test_a_rank_that_stands_by_takes_the_place_of_a_dead_one():
    base = deployment("collocated")
    spare = LossModel(with_spares(base, 1), means=MEANS_OF["spare"])
    state, ranks = MeshState(spare), base.plan.rank_ids
    assert spare.capacity_model.whole.tokens_per_second == pytest.approx(
        losses_of("collocated").capacity_model.whole.tokens_per_second
    )
    state.lose(ranks[:1])
    assert state.capacity == pytest.approx(1)
    state.lose(ranks[1:2])
    assert state.capacity < 1
    state.restore(ranks[:1])
    assert state.capacity == pytest.approx(1)


@settings(max_examples=20)
@given(st.data())
def test_pools_serve_as_if_their_dead_ranks_had_died_at_once_and_roles_switch(data):
    losses = pools()
    ids, sides, dead = sorted(losses.pool_of), PoolSides(losses), frozenset()
    for lost, some in data.draw(steps(len(ids))):
        ranks = {ids[at] for at in some}
        if lost and not ranks <= dead:
            sides.lose(ranks - dead)
            dead |= ranks
        elif not lost and ranks & dead:
            sides.restore(ranks & dead)
            dead -= ranks
        now = sides.now()
        assert now[TOGETHER].capacity == pytest.approx(as_at_once(losses, dead))
        assert now[TOGETHER].switched == bool(dead and losses.after(tuple(sorted(dead))).switched)
        decode = frozenset(losses.decode.deployment.plan.rank_ids) & dead
        assert now[DECODE].capacity == pytest.approx(as_at_once(losses.decode, decode))
        assert (now[PREFILL].capacity == 1) == (not dead - decode)


@settings(max_examples=20)
@given(st.data())
def test_the_first_loss_of_pools_costs_what_degrade_says(data):
    losses = pools()
    decode = losses.decode.deployment.plan.rank_ids
    prefill = sorted(losses.pool_of.keys() - set(decode))
    whole = st.sampled_from([tuple(prefill), tuple(decode), (*prefill, decode[0]), (prefill[0], *decode)])
    some = st.lists(st.sampled_from(sorted(losses.pool_of)), min_size=1, max_size=4, unique=True)
    dead = tuple(sorted(data.draw(st.one_of(some, whole))))
    outcome, cost = losses.outcome(dead), PoolSides(losses).lose(dead)
    assert cost[TOGETHER].phases == (losses.after(dead).shares[0].phases if outcome.survivable else {})
    assert cost[TOGETHER].tokens == pytest.approx(cost[PREFILL].tokens + cost[DECODE].tokens)
    if not set(dead) & set(decode):
        assert not cost[TOGETHER].phases, "streams do not wait for ranks that compute prompts"
        assert not cost[DECODE].tokens


def test_while_one_side_does_the_work_of_both_its_losses_cost_what_is_new():
    losses = pools()
    decode = losses.decode.deployment.plan.rank_ids
    prefill = sorted(losses.pool_of.keys() - set(decode))
    sides = PoolSides(losses)
    first = sides.lose(decode)[TOGETHER]
    assert "prompts" in first.phases, "all streams are computed again on the other side"
    assert first.tokens > 0
    assert sides.now()[TOGETHER].switched
    second = sides.lose(prefill[:1])[TOGETHER]
    assert "prompts" not in second.phases
    assert 0 < sum(second.phases.values()) < sum(first.phases.values())
    assert sides.restore(decode) >= {DECODE, TOGETHER}
    assert not sides.now()[TOGETHER].switched
    assert set(chain(decode, prefill)) == sides.members[TOGETHER]
