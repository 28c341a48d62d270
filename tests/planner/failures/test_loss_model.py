"""Laws of degrade: it says what solve then does, and every loss ends in a means or in a reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import Cluster, Hardware, InputError, Workload, moves, solve
from planner.cost.design import design
from planner.cost.remaining_score import remaining_score
from planner.failures.loss_bands import LossBands
from planner.failures.loss_forecast import WORST, check_gate, forecast_losses, summarise, worst_losses
from planner.failures.loss_model import MEANS, LossModel
from planner.failures.survivors import CapacityModel, _regroupings, survivors
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.inputs.recovery_times import read_recovery_times
from planner.plan.deployment import Deployment, FaultTolerance
from planner.plan.expert_loads import zipf_loads
from tests.support.strategies import cases


def deployment(case, **more) -> Deployment:
    plan = solve(case.workload, case.cluster, slots_per_rank=case.slots, loads=case.loads, **more)
    return Deployment(
        plan=plan, workload=case.workload, cluster=case.cluster, loads=tuple(map(tuple, case.loads.tolist()))
    )


@given(cases(), st.data())
def test_degrade_counts_what_solve_then_moves(case, data):
    d = deployment(case)
    if case.ranks == 1:
        return
    dead = data.draw(st.sets(st.sampled_from(d.plan.rank_ids), min_size=1, max_size=case.ranks - 1))
    outcome = LossModel(d).outcome(dead)
    alive = set(d.plan.rank_ids) - dead
    after = solve(case.workload, case.cluster, alive=alive, previous=d.plan, loads=d.load_array())
    made = moves(d.plan, after)
    assert outcome.survivable
    assert outcome.means.get("store", 0) == len(made)
    assert outcome.bytes_moved == len(made) * case.workload.expert_bytes
    assert bool(outcome.means.get("regrow")) == (after.slots_per_rank > d.plan.slots_per_rank)
    assert outcome.from_memory == (not made and after.slots_per_rank == d.plan.slots_per_rank)
    if made and after.slots_per_rank == d.plan.slots_per_rank:
        busiest = max(Counter(m.rank for m in made).values())
        hardware = case.cluster.hardware
        assert outcome.phases["weights"] >= busiest * 100 / hardware.host_to_device_bandwidth * (1 - 1e-9)


@given(cases(), st.data())
def test_losing_more_is_never_survived_with_less(case, data):
    d = deployment(case)
    if case.ranks < 3:
        return
    losses = LossModel(d, means=[m for m in MEANS if m not in ("regrow", "mask")])
    few = data.draw(st.sets(st.sampled_from(d.plan.rank_ids), min_size=1, max_size=case.ranks - 2))
    more = few | {data.draw(st.sampled_from(sorted(set(d.plan.rank_ids) - few)))}
    a, b = losses.outcome(few), losses.outcome(more)
    assert a.survivable or not b.survivable
    assert b.traffic_lost >= a.traffic_lost - 1e-12


@given(cases())
def test_more_slots_are_never_less_survivable_from_memory(case):
    few = LossModel(deployment(case))
    roomy = LossModel(deployment(replace(case, slots=case.slots + max(1, -(-case.workload.experts // case.ranks)))))
    for rank in case.cluster.ids:
        if case.ranks > 1:
            assert roomy.outcome({rank}).from_memory >= few.outcome({rank}).from_memory


def one_expert_each() -> Deployment:
    workload = Workload(moe_layers=2, experts=4, experts_per_token=1, expert_bytes=100)
    cluster = Cluster.local(4)
    return Deployment(plan=solve(workload, cluster, slots_per_rank=1), workload=workload, cluster=cluster)


def test_without_slots_or_store_a_loss_is_not_survived_unless_masked():
    d = one_expert_each()
    plain = [m for m in MEANS if m not in ("regrow", "mask")]
    refused = LossModel(d, means=plain).outcome({0})
    assert not refused.survivable
    assert refused.reason == "4 experts do not fit in 3 slots (3 ranks x 1)"
    masked = LossModel(d, means=[*plain, "mask"]).outcome({0})
    assert masked.survivable
    assert masked.masked == 2
    assert masked.score == pytest.approx(remaining_score(0.25))
    assert masked.traffic_lost == pytest.approx(0.25)
    grown = LossModel(d, means=[*plain, "regrow"]).outcome({0})
    assert grown.means == {"store": 2, "regrow": 1}


def test_without_a_store_single_copies_are_masked_or_lost():
    d = one_expert_each()
    d = replace(d, plan=solve(d.workload, d.cluster, slots_per_rank=2, protect="none"))
    assert LossModel(d).outcome({0}).from_memory
    thin = replace(d, plan=solve(d.workload, Cluster.local(3), slots_per_rank=2))
    no_store = [m for m in MEANS if m not in ("store", "mask")]
    lost = [LossModel(thin, means=no_store).outcome({r}) for r in range(3)]
    assert any("no copy, parity group or store" in o.reason for o in lost)
    assert all(o.survivable for o in (LossModel(thin, means=[*no_store, "mask"]).outcome({r}) for r in range(3)))


def test_a_broken_tensor_group_loses_its_cache_and_its_other_ranks_hold_experts_only():
    model, cluster = read_model("qwen3-30b-a3b"), read_cluster("v5e:2x8")
    d = design(model, cluster).deployment
    tensor = d.shape.tensor
    assert tensor > 1
    capacity_model = CapacityModel(d)
    left = survivors(d, {0}, capacity_model)
    outcome = LossModel(d).outcome({0})
    assert left.broken_groups == 1
    assert outcome.cache_tokens == int(capacity_model.whole.requests_per_group * d.traffic.context)
    if left.tensor == tensor:
        assert left.data == d.shape.data - 1
        assert set(left.roles.values()) == {"expert"}
        assert len(left.roles) == tensor - 1
    else:
        assert left.peer_bytes > 0
    assert 0 < outcome.capacity < 1


@pytest.mark.parametrize("arch", ["collocated", "disaggregated"])
def test_only_ranks_that_attend_load_attention_weights(arch):
    model, cluster = read_model("qwen3-30b-a3b"), read_cluster("v5e:4x8")
    d = design(model, cluster, arch=arch, tensor=4).deployment
    ways = list(_regroupings(CapacityModel(d), {0}, narrow=True))
    assert [left.tensor for left in ways] == [4, 2]
    for left in ways:
        assert left.peer_bytes == 0 or left.peer_ranks <= left.data * left.tensor <= len(d.plan.attention_rank_ids)
    assert ways[1].peer_ranks == ways[1].data * 2


def test_a_standby_rank_that_takes_experts_alone_loads_no_attention_weights():
    model, cluster = read_model("qwen3-30b-a3b"), read_cluster("v5e:4x8")
    d = design(model, cluster, arch="disaggregated", standby=1, tensor=1).deployment
    for role, attends in (("expert", 0), ("attention", 1)):
        dead = next(r.id for r in d.plan.ranks if r.role == role)
        left = survivors(d, {dead}, CapacityModel(d))
        assert (len(left.spares), left.peer_ranks, left.peer_bytes > 0) == (1, attends, bool(attends))


def test_attention_ranks_take_the_place_of_expert_ranks_when_slots_run_short():
    model, cluster = read_model("qwen3-30b-a3b"), read_cluster("h100:4x8")
    found = design(model, cluster, arch="disaggregated")
    d = found.deployment
    experts = list(d.plan.expert_rank_ids)
    need = -(-model.experts // d.plan.slots_per_rank)
    dead = experts[: len(experts) - need + 1]
    outcome = LossModel(d).outcome(dead)
    assert outcome.survivable
    assert outcome.means["switch"] >= 1
    refused = LossModel(d, means=[m for m in MEANS if m not in ("switch", "regrow", "mask")]).outcome(dead)
    assert not refused.survivable
    assert "do not fit in" in refused.reason
    assert outcome.phases["weights"] > 0
    attending = [r.id for r in d.plan.ranks if r.role == "attention"]
    assert not LossModel(d, means=[m for m in MEANS if m != "switch"]).outcome(attending).survivable


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 12), st.data())
def test_roles_after_a_loss_are_those_that_solve_gives(attention, experts, slots, data):
    n = attention + experts
    model = Workload(moe_layers=2, experts=8, experts_per_token=1, expert_bytes=100, hidden_bytes=8)
    cluster = Cluster.local(n)
    roles = {rank: "attention" if rank < attention else "expert" for rank in range(n)}
    slots = max(slots, -(-8 // experts))
    plan = solve(model, cluster, roles=roles, slots_per_rank=slots)
    dead = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))
    after = solve(model, cluster, alive=set(range(n)) - dead, previous=plan)
    d = Deployment(plan=plan, workload=model, cluster=cluster)
    left = survivors(d, dead, CapacityModel(d), MEANS)
    assert {r.id: left.roles.get(r.id, roles[r.id]) for r in after.ranks} == {r.id: r.role for r in after.ranks}
    assert (left.data, left.expert_rank_count) == (len(after.attention_rank_ids), len(after.expert_rank_ids))
    outcome = LossModel(d).outcome(dead)
    assert outcome.survivable
    assert outcome.means.get("switch", 0) == sum(r.role != roles[r.id] for r in after.ranks)


def test_standby_ranks_take_over():
    model, cluster = read_model("mixtral-8x7b"), read_cluster("h100")
    d = design(model, cluster, standby=1).deployment
    outcome = LossModel(d).outcome({0})
    assert outcome.means["spare"] == 1
    assert outcome.capacity == pytest.approx(1.0)
    refused = LossModel(d, means=[m for m in MEANS if m != "spare"]).outcome({0})
    assert "spare" not in refused.means
    assert refused.capacity < 1


def test_masked_experts_cost_what_their_share_of_the_traffic_costs():
    model = Workload(moe_layers=1, experts=8, experts_per_token=1, expert_bytes=100)
    cluster = Cluster.local(4)
    loads = ((65.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0),)
    plan = solve(model, cluster, slots_per_rank=2)
    losses = LossModel(Deployment(plan=plan, workload=model, cluster=cluster, loads=loads), means=("copy", "mask"))
    hot = next(rank for rank in plan.rank_ids if 0 in plan.slots_of(rank))
    for rank in plan.rank_ids:
        outcome = losses.outcome({rank})
        assert outcome.masked == 2
        assert outcome.score == pytest.approx(remaining_score(0.70 if rank == hot else 0.25))


def test_all_pairs_are_looked_at_when_asked_for():
    model, cluster = read_model("olmoe-1b-7b"), read_cluster("h100:6x8")
    losses = LossModel(design(model, cluster).deployment)
    sample, of = forecast_losses(losses, kinds=["pair"], pairs=50)
    assert (len(sample), of) == (50, 48 * 47 // 2)
    whole, of = forecast_losses(losses, kinds=["pair"], pairs=None)
    assert (len({o.dead for o in whole}), of) == (48 * 47 // 2, 0)


@settings(max_examples=10)
@given(cases())
def test_every_rank_host_and_pair_is_looked_at(case):
    losses = LossModel(deployment(case))
    outcomes, sampled = forecast_losses(losses, pairs=10_000)
    kinds = Counter(o.kind for o in outcomes)
    n = case.ranks
    assert kinds["rank"] == n
    assert kinds["pair"] == (n * (n - 1) // 2 if n > 2 else 0)
    assert sampled == 0
    rows = {r["kind"]: r for r in summarise(outcomes, LossBands(losses).of)}
    assert sum(r["cases"] for r in rows.values()) == len(outcomes)


@settings(max_examples=20)
@given(cases())
def test_a_row_of_the_worst_has_the_figures_of_one_loss(case):
    losses = LossModel(deployment(case))
    for row in summarise(forecast_losses(losses, kinds=["rank", "host"])[0], LossBands(losses).of):
        for shown in row["worst"]:
            dead = case.cluster.domains(row["kind"])[shown["name"]]
            outcome = losses.outcome(dead, kind=row["kind"])
            figures = (outcome.stall * 1e3, outcome.bytes_moved, outcome.capacity, outcome.means)
            assert (shown["stall_ms"], shown["bytes"], shown["capacity"], shown["means"]) == figures
            assert shown["worst_in"]
        assert bool(row["worst"]) == bool(row["survivable"])


@given(cases())
def test_every_figure_in_which_losses_differ_has_its_worst_loss(case):
    outcomes = [o for o in forecast_losses(LossModel(deployment(case)), pairs=50)[0] if o.survivable]
    named = {name: o for o, names in worst_losses(outcomes) for name in names}
    for name, figure in WORST.items():
        values = [figure(o) for o in outcomes]
        assert (name in named) == (bool(values) and (name == "stall" or min(values) < max(values)))
        assert name not in named or figure(named[name]) == max(values)


def test_the_loss_of_the_only_rank_is_not_survivable():
    model = read_model("llama-3.1-8b")
    d = design(model, read_cluster("h100:1x1"), survive=FaultTolerance(ranks=0)).deployment
    (row,) = summarise(forecast_losses(LossModel(d))[0], LossBands(LossModel(d)).of)
    assert (row["kind"], row["cases"], row["survivable"], row["worst"]) == ("rank", 1, 0, [])
    assert row["reasons"]


def test_a_sample_of_pairs_says_of_how_many():
    workload = Workload(moe_layers=1, experts=8, experts_per_token=1, expert_bytes=1)
    cluster = Cluster.regular("c", 5, 8, hardware=Hardware())
    losses = LossModel(Deployment(plan=solve(workload, cluster), workload=workload, cluster=cluster))
    outcomes, sampled = forecast_losses(losses, kinds=["pair"], pairs=7)
    assert (len(outcomes), sampled) == (7, 780)
    assert [o.dead for o in outcomes] == [o.dead for o in forecast_losses(losses, kinds=["pair"], pairs=7)[0]]


def test_gates_hold_or_say_what_the_value_is():
    d = one_expert_each()
    summary = summarise(forecast_losses(LossModel(d), kinds=["rank"])[0], LossBands(LossModel(d)).of)
    assert check_gate("survivable>=1.0, worst_stall_ms<=500", summary) == []
    broken = check_gate("from_memory>=0.5, rank.capacity>=0.9", summary)
    assert broken == ["from_memory>=0.5: it is 0", "rank.capacity>=0.9: it is 0.75"]
    for text, message in (
        ("worst_stal<=1", "Did you mean 'worst_stall_ms'"),
        ("host.survivable>=1", "unknown key 'host'"),
        ("survivable=1", "is not NAME>=NUMBER"),
    ):
        with pytest.raises(InputError, match=message):
            check_gate(text, summary)


def test_measured_phases_replace_the_estimates(tmp_path):
    file = tmp_path / "recovery.json"
    file.write_text(
        '{"kills": [{"adopt_ms": 10}, {"adopt_ms": 30}], "summary": {"detect_ms": 5,'
        '"survivor_stall_ms": {"median": 60, "max": 90}, "rejoin_pause_ms": 400, "warm_restart_s": 12}}'
    )
    found = read_recovery_times(file)
    assert (found.detect, found.adopt, found.restart, found.rejoin) == (0.005, 0.02, 12.0, 0.4)
    assert found.abort == pytest.approx(0.035)
    assert found.source == "measured"
    file.write_text('{"summary": {}}')
    with pytest.raises(InputError, match=r"no result of benchmarks\.recovery"):
        read_recovery_times(file)


def test_the_score_kept_follows_the_paper():
    assert remaining_score(0) == 1
    assert remaining_score(1 / 8) == pytest.approx(0.663 / 0.683)
    assert remaining_score(0.9) == pytest.approx(0.542 / 0.683)


def test_deepseek_v3_survives_any_rank_and_host_from_memory_with_two_copies():
    model, cluster = read_model("deepseek-v3"), read_cluster("h200:8x8")
    d = design(model, cluster, loads=zipf_loads(model, 0.5), slots=9).deployment
    outcomes, _ = forecast_losses(LossModel(d), kinds=["rank", "host"])
    assert all(o.from_memory for o in outcomes)
