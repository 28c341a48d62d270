"""Laws of certificates of pools: they hold exactly if every loss of either side, and of both, keeps the levels."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import planner.failures.certificate
from planner import NoFeasiblePlan, solve
from planner.cost.pools import design_pools
from planner.failures.certificate import ServiceLevels, Terms, certify
from planner.failures.certificate_file import Certificate, certificate
from planner.failures.loss_model import MEANS
from planner.failures.pool_losses import PoolLossModel
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.inputs.traffic import Traffic
from planner.plan.deployment import Deployment, FaultTolerance
from planner.plan.pools import PooledDeployment
from tests.support.strategies import cases
from tests.support.unions import unions

TRAFFIC = Traffic(prompt=64, output=64, tpot_ms=1e6, ttft_ms=1e9)


@st.composite
def pools(draw) -> PooledDeployment:
    """One or two prefill instances alike and a pool for decode, on hosts that may have ranks of several of them."""
    case = draw(cases(most_ranks=8))
    devices, experts = case.cluster.devices, case.workload.experts
    assume(len(devices) >= 3)
    instances = draw(st.integers(1, 2))
    size = draw(st.integers(1, (len(devices) - 1) // instances))
    sizes = {"expert_bytes": 10**8, "rest_bytes": 10**6, "hidden_bytes": 64, "cache_bytes_per_token": 64}
    workload = replace(case.workload, layers=4, heads=4, **sizes)
    spare, dense = draw(st.integers(0, 2)), draw(st.booleans())

    def pool(begin: int, end: int, work: str) -> Deployment:
        part = replace(case.cluster, devices=devices[begin:end])
        slots = -(-experts // (end - begin)) + spare
        try:
            plan = solve(workload, part, slots_per_rank=slots, loads=case.loads)
        except NoFeasiblePlan:
            assume(False)
            raise
        if dense and work == "decode":
            plan = replace(plan, axes=(*plan.axes, ("dense", 2)))
        loads = tuple(map(tuple, case.loads.tolist()))
        return Deployment(plan=plan, workload=workload, cluster=part, loads=loads, traffic=TRAFFIC, work=work)

    rest = len(devices) - instances * size
    starts = [rest + at * size for at in range(instances)]
    prefill = tuple(pool(start, start + size, "prompts") for start in starts)
    return PooledDeployment(prefill=prefill, decode=pool(0, rest, "decode"))


def every_loss(losses: PoolLossModel, survive: FaultTolerance) -> set[tuple[int, ...]]:
    """All losses that are to be survived, by hand: of ranks and hosts of all pools."""
    found = set()
    hosts: dict[str, tuple[int, ...]] = {}
    for pool in losses.deployment.pools().values():
        for rank in pool.plan.ranks:
            hosts[rank.host] = (*hosts.get(rank.host, ()), rank.id)
    ranks = [(rank,) for ids in hosts.values() for rank in ids]
    for units, most in ((ranks, survive.ranks), (list(hosts.values()), survive.hosts)):
        found |= unions(units, most)
    return found


def kept(losses: PoolLossModel, terms: Terms, dead: tuple[int, ...]) -> bool:
    """Whether one loss keeps the service levels."""
    outcome = losses.outcome(dead)
    if not outcome.survivable:
        return False
    figures = {
        "tpot_ms": losses.after(dead).tpot_ms(terms.requests)["mid"],
        "stall_ms": outcome.stall * 1e3,
        "moved_stall_ms": outcome.moved_stall * 1e3,
        "capacity": outcome.capacity,
    }
    return not terms.levels.missed(figures)


@settings(max_examples=80, deadline=None)
@given(pools(), st.integers(1, 3), st.integers(0, 2), st.data())
def test_a_certificate_holds_exactly_if_every_loss_keeps_it_and_else_names_a_smallest(pooled, ranks, hosts, data):
    means = [m for m in MEANS if m != "mask" and (m not in ("store", "switch") or data.draw(st.booleans()))]
    losses = PoolLossModel(pooled, means=means)
    survive = FaultTolerance(ranks=ranks, hosts=hosts)
    dead = sorted(every_loss(losses, survive))
    outcomes = [losses.outcome(each) for each in dead]
    longest = max((each for each in outcomes if each.survivable), key=lambda each: each.stall, default=outcomes[0])
    example = longest if data.draw(st.booleans()) else data.draw(st.sampled_from(outcomes))
    slack = data.draw(st.sampled_from([0.999, 1.001, 2.0]))
    levels = ServiceLevels(
        stall_ms=max(1e-3, example.stall * 1e3 * slack),
        moved_stall_ms=data.draw(st.sampled_from([None, max(1e-3, example.moved_stall * 1e3 * slack)])),
        capacity=data.draw(st.sampled_from([None, 0.3, 0.8])),
        tpot_ms=data.draw(st.sampled_from([None, 1e6])),
    )
    whole = losses.decode.capacity_model.whole
    terms = Terms(survive=survive, levels=levels, requests=max(1, whole.requests_per_group * whole.shape.data // 2))
    failing = [each for each in dead if not kept(losses, terms, each)]
    for each in (0, 10**6):
        verdict = certify(losses, terms, each=each)
        if verdict.missed:
            continue
        assert verdict.holds == (not failing), each
        if failing:
            assert verdict.failing is not None
            found = verdict.failing.failing
            assert found is not None
            assert not kept(losses, terms, found.dead)
            assert len(found.dead) == min(map(len, failing))
            continue
        for loss in dead:
            ranges = losses.ranges(losses.outcome(loss))
            for name in ("stall_ms", "moved_stall_ms"):
                assert ranges[name]["high"] <= max(size.ranges[name]["high"] for size in verdict.sizes) * (1 + 1e-9)


@pytest.fixture(scope="module")
def served() -> PoolLossModel:
    return PoolLossModel(design_pools(read_model("qwen3-30b-a3b"), read_cluster("h100:4x2")).deployment)


def test_a_certificate_of_pools_names_what_of_them_is_another(served):
    pooled, key = served.deployment, b"0123456789abcdef"
    terms = Terms(survive=FaultTolerance(ranks=1, hosts=1), levels=ServiceLevels(stall_ms=1e4), requests=8)
    made = certificate(served, terms, certify(served, terms), one_front=True).signed(key)
    again = Certificate.from_json(made.to_json())
    again.check(key)
    assert again.differences(pooled) == []
    assert again.differences(pooled.each(lambda d: replace(d, plan=d.plan.with_epoch(7)))) == []
    assert again.differences(pooled.decode) == ["plan", "cluster", "loads"]
    other = replace(pooled, prefill=(replace(pooled.prefill[0], loads=((1.0,),)), *pooled.prefill[1:]))
    assert again.differences(other) == ["loads"]
    plan = pooled.decode.plan
    slots = (plan.slots[0][::-1], *plan.slots[1:])
    moved = replace(pooled, decode=replace(pooled.decode, plan=replace(plan, slots=slots)))
    assert again.differences(moved) == ["plan"]


def test_losses_of_more_types_than_can_be_bounded_are_not_proven_and_larger_ones_are_left_out(served, monkeypatch):
    monkeypatch.setattr(planner.failures.certificate, "MOST_TYPES", 1)
    terms = Terms(survive=FaultTolerance(ranks=8, hosts=1), levels=ServiceLevels(stall_ms=1e6), requests=8)
    verdict = certify(served, terms, each=0)
    assert not verdict.holds
    assert verdict.failing is None
    assert [(size.kind, size.lost, size.unfinished) for size in verdict.sizes] == [
        ("rank", 1, True),
        ("host", 1, True),
    ]


def test_a_loss_that_fails_is_named_with_its_side(served):
    terms = Terms(survive=FaultTolerance(ranks=1), levels=ServiceLevels(stall_ms=1.0), requests=8)
    found = certify(served, terms).failing
    assert found is not None
    assert found.failing is not None
    assert found.failing.name.endswith("(decode)"), "no stream waits for a rank that computes prompts"


def test_millions_of_losses_of_pools_are_certified_with_few_of_them_priced():
    model = replace(read_model("olmoe-1b-7b"), moe_layers=2)
    pooled = design_pools(model, read_cluster("h100:64x8")).deployment
    losses = PoolLossModel(pooled, one_front=False)
    terms = Terms(survive=FaultTolerance(ranks=3, hosts=2), levels=ServiceLevels(stall_ms=5000), requests=64)
    verdict = certify(losses, terms, each=0)
    assert verdict.holds
    assert sum(size.losses for size in verdict.sizes) > 10**7
    assert sum(size.priced for size in verdict.sizes) < 1000
