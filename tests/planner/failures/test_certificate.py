"""Laws of certificates: what they prove holds for every loss, and what they name is the smallest that does not."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from math import inf

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner import InputError, NoFeasiblePlan, solve
from planner.cost.design import design
from planner.failures.certificate import ServiceLevels, Terms, Verdict, certify, read_service_levels
from planner.failures.certificate_file import Certificate, certificate, read_key
from planner.failures.loss_bands import LossBands
from planner.failures.loss_model import MEANS, LossModel
from planner.failures.loss_types import LossTypes, examples
from planner.failures.lost_copies import LostCopies
from planner.failures.survivors import CapacityModel, survivors
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.inputs.traffic import Traffic
from planner.plan.deployment import Deployment, FaultTolerance
from tests.support.strategies import cases
from tests.support.unions import unions

PATIENT = Traffic(prompt=64, output=64, tpot_ms=1e6, ttft_ms=1e9)


@st.composite
def deployments(draw) -> Deployment:
    """Small plans with and without tensor groups, dense groups, roles apart and standby ranks."""
    case = draw(cases(most_ranks=7))
    n, experts = case.ranks, case.workload.experts
    assume(n > 2)
    kind = draw(st.sampled_from(["plain", "tensor", "dense", "apart", "standby"]))
    workload = replace(case.workload, layers=4, heads=4, rest_bytes=10**6, dense_bytes=10**5, hidden_bytes=64)
    more, slots = {}, case.slots
    if kind == "tensor":
        more = {"tensor": 2}
    elif kind == "apart":
        attention = draw(st.integers(1, n - 1))
        more = {"roles": {rank: "attention" if rank < attention else "expert" for rank in range(n)}}
        slots = max(slots, -(-experts // (n - attention)))
    elif kind == "standby":
        more = {"roles": {n - 1: "standby"}}
        slots = max(slots, -(-experts // (n - 1)))
    try:
        plan = solve(workload, case.cluster, slots_per_rank=slots, loads=case.loads, **more)
    except NoFeasiblePlan:
        assume(False)
        raise
    if kind == "dense":
        plan = replace(plan, axes=(*plan.axes, ("dense", 2)))
    loads = tuple(map(tuple, case.loads.tolist()))
    return Deployment(plan=plan, workload=workload, cluster=case.cluster, loads=loads, traffic=PATIENT)


def every_loss(d: Deployment, survive: FaultTolerance) -> set[tuple[int, ...]]:
    """All losses that are to be survived, by hand."""
    found = set()
    for kind, most in (("rank", survive.ranks), ("host", survive.hosts)):
        units = [ids for ids in d.cluster.domains(kind).values() if set(ids) <= set(d.plan.rank_ids)]
        found |= unions(units, most)
    return found


def kept(losses: LossModel, terms: Terms, dead: tuple[int, ...]) -> bool:
    """Whether one loss keeps the service levels, by the loss model."""
    outcome = losses.outcome(dead)
    if not outcome.survivable:
        return False
    left = survivors(losses.deployment, dead, losses.capacity_model, losses.means)
    seconds = losses.capacity_model.token_seconds(left, losses.slots_after(left)[0], terms.requests)
    tpot = 1e3 * max(seconds, losses.recovery.front.step_seconds(left.ranks, terms.requests))
    figures = {"tpot_ms": tpot, "stall_ms": outcome.stall * 1e3, "capacity": outcome.capacity}
    return not terms.levels.missed(figures | {"moved_stall_ms": outcome.moved_stall * 1e3})


def assert_ranges_hold(
    losses: LossModel, terms: Terms, dead: list[tuple[int, ...]], verdict: Verdict, *, exact: bool
) -> None:
    """The verdict's ranges hold those of every loss, and it is unsure if a loss misses at the worse ends; only if,
    where all losses were priced."""
    bands, unsure = LossBands(losses), False
    for each in dead:
        ranges = bands.of(losses.outcome(each))
        for name in ("stall_ms", "moved_stall_ms"):
            assert ranges[name]["high"] <= max(size.ranges[name]["high"] for size in verdict.sizes) * (1 + 1e-9)
        limit, least = terms.levels.stall_ms, terms.levels.capacity
        unsure |= bool(limit and ranges["stall_ms"]["high"] > limit)
        unsure |= bool(least and ranges["capacity"]["low"] < least)
    if unsure or (exact and terms.levels.tpot_ms is None):
        assert bool(verdict.unsure) == unsure


@settings(max_examples=60, deadline=None)
@given(deployments(), st.integers(1, 3), st.integers(0, 2), st.data())
def test_a_certificate_holds_exactly_if_every_loss_keeps_it_and_else_names_a_smallest(d, ranks, hosts, data):
    means = [m for m in MEANS if m != "mask" and (m != "store" or data.draw(st.booleans()))]
    losses = LossModel(d, means=means)
    survive = FaultTolerance(ranks=ranks, hosts=hosts)
    dead = sorted(every_loss(d, survive))
    example = losses.outcome(data.draw(st.sampled_from(dead)))
    slack = data.draw(st.sampled_from([0.999, 1.0, 1.001, 2.0]))
    levels = ServiceLevels(
        stall_ms=max(1e-3, example.stall * 1e3 * slack),
        capacity=data.draw(st.sampled_from([None, 0.5, 0.8])),
        tpot_ms=data.draw(st.sampled_from([None, 1e6])),
    )
    whole = losses.capacity_model.whole
    terms = Terms(survive=survive, levels=levels, requests=max(1, whole.requests_per_group * whole.shape.data // 2))
    failing = [each for each in dead if not kept(losses, terms, each)]
    for each in (0, 10**6):
        verdict = certify(losses, terms, each=each)
        if verdict.missed:
            continue
        assert verdict.holds == (not failing), each
        if not failing:
            assert_ranges_hold(losses, terms, dead, verdict, exact=each > 0)
        if failing:
            assert verdict.failing is not None
            found = verdict.failing.failing
            assert found is not None
            assert not kept(losses, terms, found.dead)
            assert len(found.dead) == min(map(len, failing))


@settings(max_examples=50, deadline=None)
@given(deployments(), st.data())
def test_losses_of_one_type_leave_the_same_mesh_and_no_weights_take_longer_than_the_bound(d, data):
    capacity_model, losses = CapacityModel(d), LossModel(d, means=[m for m in MEANS if m != "mask"])
    types, seen = LossTypes(capacity_model), {}
    assume(types.exact)
    count = data.draw(st.integers(1, 3))
    for dead in combinations(d.plan.rank_ids, count):
        left = survivors(d, dead, capacity_model)
        mesh = (left.ranks, left.data, left.expert_rank_count, left.tensor, left.dense, left.broken_groups)
        mesh = (*mesh, len(left.switched), len(left.spares), left.peer_bytes)
        assert seen.setdefault(types.of(dead), mesh) == mesh
        outcome = losses.outcome(dead)
        if outcome.survivable:
            lost = losses.lost_pairs(dead)
            assert outcome.phases["weights"] <= losses.weights_at_most(left, lost, count) * (1 + 1e-9)
    units = [(rank,) for rank in d.plan.rank_ids]
    found = {types.of([units[at][0] for at in chosen]) for chosen in examples(units, count, types.of) or ()}
    assert found == set(seen)


@settings(max_examples=50, deadline=None)
@given(cases(most_ranks=7), st.integers(1, 4), st.sampled_from(["rank", "host"]), st.data())
def test_no_set_takes_more_last_copies_than_the_bound_and_none_above_a_number_is_left_out(case, count, kind, data):
    plan = solve(case.workload, case.cluster, slots_per_rank=case.slots, loads=case.loads)
    losses = LossModel(Deployment(plan=plan, workload=case.workload, cluster=case.cluster))
    units = list(case.cluster.domains(kind).values())
    assume(count <= len(units))
    copies = LostCopies([plan], units, count)
    lost = {
        chosen: losses.lost_pairs([rank for at in chosen for rank in units[at]])
        for chosen in combinations(range(len(units)), count)
    }
    assert max(lost.values()) <= copies.most()
    assert count > 2 or max(lost.values()) == copies.most()
    limit = data.draw(st.integers(0, copies.most()))
    above = [tuple(sorted(chosen)) for chosen in copies.sets_above(limit)]
    assert len(above) == len(set(above))
    assert {chosen for chosen, pairs in lost.items() if pairs > limit} <= set(above)
    assert count > 2 or {chosen for chosen, pairs in lost.items() if pairs > limit} == set(above)


def certified(key: bytes = b"") -> tuple[LossModel, Certificate]:
    losses = LossModel(design(read_model("olmoe-1b-7b"), read_cluster("h100")).deployment)
    terms = Terms(survive=FaultTolerance(), levels=ServiceLevels(stall_ms=2000), requests=8)
    made = certificate(losses, terms, certify(losses, terms), one_front=True)
    return losses, made.signed(key) if key else made


def test_a_signature_is_of_everything_in_the_file_and_of_the_key():
    key = b"0123456789abcdef"
    losses, made = certified(key)
    again = Certificate.from_json(made.to_json())
    assert again == made
    again.check(key)
    assert again.differences(losses.deployment) == []
    with pytest.raises(InputError, match="not of this key"):
        again.check(key[::-1])
    data = json.loads(made.to_json())
    changed = 0
    for name, value in data.items():
        other = {**data, name: _other(value)}
        if name != "form":
            with pytest.raises(InputError, match=r"was changed|no certificate"):
                Certificate.from_json(json.dumps(other)).check(key)
            changed += 1
    assert changed >= 9
    with pytest.raises(InputError, match="is not signed"):
        certified()[1].check(key)


def _other(value: object) -> object:
    """A value of the same kind that is another."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        name = next(n for n, v in value.items() if v is not None)
        return {**value, name: _other(value[name])}
    if isinstance(value, list):
        return value[1:]
    return value + ("0" if isinstance(value, str) else 1)  # type: ignore[operator]


def test_another_plan_model_cluster_or_load_is_said_by_name():
    losses, made = certified()
    d = losses.deployment
    assert made.differences(replace(d, plan=d.plan.with_epoch(7))) == []
    slots = (d.plan.slots[0][::-1], *d.plan.slots[1:])
    assert made.differences(replace(d, plan=replace(d.plan, slots=slots))) == ["plan"]
    assert made.differences(replace(d, workload=replace(d.workload, heads=2))) == ["model"]
    assert made.differences(replace(d, loads=((1.0,),))) == ["loads"]
    assert made.differences(replace(d, cluster=replace(d.cluster, name="other"))) == ["cluster"]


@pytest.mark.parametrize("text", ["", "tpot=1", "tpot_ms=-1", "stall_ms=0", "capacity=1.5", "tpot_ms=50,tpot_ms=60"])
def test_service_levels_that_ask_for_nothing_or_the_impossible_are_refused(text):
    with pytest.raises(InputError, match="--slo"):
        read_service_levels(text)


def test_levels_that_are_missed_are_named_with_both_values():
    levels = read_service_levels("tpot_ms=50,capacity=0.9")
    figures = {"tpot_ms": 60.0, "stall_ms": inf, "moved_stall_ms": inf, "capacity": 0.95}
    assert levels.missed(figures) == "tpot_ms 60, asked 50"
    assert levels.missed(figures | {"tpot_ms": 50.0}) == ""


def test_a_key_is_a_file_of_enough_bytes(tmp_path):
    short = tmp_path / "key"
    short.write_text("0123\n")
    with pytest.raises(InputError, match="has 4 bytes, at least 16"):
        read_key(short)
    short.write_text("0123456789abcdef\n")
    assert read_key(short) == b"0123456789abcdef"


def test_millions_of_losses_are_certified_with_few_of_them_priced():
    model = replace(read_model("olmoe-1b-7b"), moe_layers=2)
    d = design(model, read_cluster("h100:64x8"), slots=1).deployment
    losses = LossModel(d, one_front=False)
    terms = Terms(survive=FaultTolerance(ranks=3, hosts=2), levels=ServiceLevels(stall_ms=2000), requests=64)
    verdict = certify(losses, terms, each=0)
    assert verdict.holds
    assert sum(size.losses for size in verdict.sizes) > 10**7
    assert sum(size.priced for size in verdict.sizes) < 1000
