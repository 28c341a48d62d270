"""Laws of clusters with devices of several kinds: what they reach lies between their kinds, and faster ones do more."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import InputError
from planner.cli.main import main
from planner.cost.design import design
from planner.cost.mixed import (
    assess_kinds,
    expert_speeds,
    group_kinds,
    placement_speeds,
    rank_speeds,
    seconds_of_requests,
)
from planner.cost.throughput import assess, requests_that_fit
from planner.cost.trade_off import decode_speed
from planner.failures.certificate import ServiceLevels, Terms, certify
from planner.failures.loss_model import LossModel
from planner.inputs.cluster import Cluster, cluster_from, read_cluster, slowest
from planner.inputs.published import read_model
from planner.inputs.traffic import Traffic
from planner.plan.deployment import Deployment, FaultTolerance, read_deployment
from planner.plan.expert_loads import zipf_loads
from planner.solver.balance import peak_load, relative_rank_loads
from planner.solver.placement import slots_by_speed
from planner.solver.rebalance import MODES, rebalance

MODEL = read_model("qwen3-235b-a22b")
HOSTS = [{"count": 2, "devices": 8}, {"count": 2, "devices": 8, "preset": "b200"}]


def mixed(**differs) -> Cluster:
    return cluster_from({"name": "mixed", "hardware": {"preset": "h100", **differs}, "hosts": HOSTS}, "mixed.toml")


@pytest.fixture(scope="module")
def designed():
    return design(MODEL, mixed(), loads=zipf_loads(MODEL, 0.8))


def test_a_cluster_file_names_hosts_of_several_kinds_and_a_plan_file_keeps_them(designed):
    cluster = mixed()
    assert [d.kind for d in cluster.devices] == ["h100"] * 16 + ["b200"] * 16
    assert [d.host for d in cluster.devices[7:9]] == ["host0", "host1"]
    assert cluster.hardware == slowest(cluster.kinds)
    h100, b200 = cluster.kinds["h100"], cluster.kinds["b200"]
    assert cluster.hardware.memory_bytes == min(h100.memory_bytes or 0, b200.memory_bytes or 0)
    assert cluster.hardware.step_overhead == max(h100.step_overhead, b200.step_overhead)
    assert Deployment.from_json(designed.deployment.to_json()) == designed.deployment
    same = {"hosts": [{"count": 1, "devices": 2}, {"count": 1, "devices": 2, "preset": "h100"}]}
    assert cluster_from({**same, "hardware": {"preset": "h100"}}, "same").kinds == {}
    assert all(each.store == "disk" for each in mixed(store="disk").kinds.values())


@pytest.mark.parametrize("tpot_ms", [30.0, 50.0, 100.0])
@pytest.mark.parametrize("tensor", [1, 2])
def test_tokens_lie_between_those_of_the_kinds_and_no_stream_is_too_slow(tpot_ms, tensor):
    traffic, cluster = Traffic(tpot_ms=tpot_ms), mixed()
    shape = design(MODEL, read_cluster("h100:4x8"), tensor=tensor, slots=8).chosen.shape
    found = assess_kinds(MODEL, cluster, shape, traffic)
    slow, fast = (assess_kinds(MODEL, cluster.only(kind), shape, traffic) for kind in ("h100", "b200"))
    assert slow.tokens_per_second <= found.tokens_per_second <= fast.tokens_per_second
    requests = dict(found.requests_by_kind)
    room = requests_that_fit(MODEL, found.pages_per_rank, traffic)
    assert requests["h100"] < requests["b200"] or requests["h100"] == room
    assert max(requests.values()) <= room
    assert 1 / found.tokens_per_second_per_user <= tpot_ms / 1e3 + 1e-9
    assert group_kinds(cluster, shape) == dict.fromkeys(("h100", "b200"), shape.data // 2)


def test_faster_ranks_get_more_of_the_expert_traffic(designed):
    d = designed.deployment
    speeds = expert_speeds(MODEL, d.cluster, d.shape, d.traffic.context)
    assert speeds["b200"] > 1 > speeds["h100"]
    load = relative_rank_loads(d.plan, d.load_array()).mean(axis=0)
    kinds = np.array([device.kind for device in d.cluster.devices])
    assert load[kinds == "b200"].mean() > 1.1 > 0.9 > load[kinds == "h100"].mean()
    by_speed = rank_speeds(MODEL, d.cluster, d.shape, d.traffic.context)
    even = design(MODEL, read_cluster("h100:4x8"), loads=zipf_loads(MODEL, 0.8), slots=d.plan.slots_per_rank)
    assert (
        peak_load(d.plan, d.load_array(), by_speed).max()
        < peak_load(even.deployment.plan, d.load_array(), by_speed).max()
    )


def test_losses_leave_no_more_than_the_whole_and_the_fastest_are_taken_as_lost(designed):
    losses = LossModel(designed.deployment)
    for dead in ({0}, {31}, set(range(8)), set(range(24, 32))):
        outcome = losses.outcome(dead)
        assert outcome.survivable
        assert 0 < outcome.capacity < 1
    shape = losses.capacity_model.shape
    left = group_kinds(designed.deployment.cluster, replace(shape, roles=shape.roles[8:], groups=shape.groups[:24]))
    assert left["h100"] == 16


def test_requests_fit_the_pages_of_the_plan_which_are_those_of_the_smallest_kind():
    model, traffic = read_model("deepseek-v3"), Traffic(tpot_ms=200)
    hosts = [{"count": 1, "devices": 8}, {"count": 1, "devices": 8, "preset": "b200"}]
    cluster = cluster_from({"name": "mixed", "hardware": {"preset": "h100"}, "hosts": hosts}, "mixed.toml")
    found = design(model, cluster, traffic=traffic)
    plan, best = found.deployment.plan, found.chosen
    room = requests_that_fit(model, plan.pages_per_rank, traffic)
    most = max(dict(best.requests_by_kind).values(), default=best.requests_per_group)
    assert 0 < most <= room
    uses = dict(best.memory)
    assert sum(uses.values()) <= min(kind.memory_bytes or 0 for kind in cluster.kinds.values())
    splits = min(best.shape.tensor, model.cache_splits)
    assert uses["cache in use"] == most * traffic.longest * model.cache_bytes_per_token // splits


@pytest.mark.parametrize("tpot_ms", [30, 40, 50])
def test_a_limit_on_the_first_token_holds_for_requests_by_kind(tpot_ms):
    cluster, traffic = mixed(), Traffic(tpot_ms=tpot_ms)
    shape = design(MODEL, read_cluster("h100:4x8"), tensor=1, slots=8).chosen.shape
    slow = assess(MODEL, cluster, shape, traffic)
    limit = slow.ttft_seconds * 1e3 * 1.0001
    found = assess_kinds(MODEL, cluster, shape, replace(traffic, ttft_ms=limit))
    assert not found.reason
    assert found.ttft_seconds * 1e3 <= limit
    assert found.tokens_per_second > slow.tokens_per_second


@pytest.mark.parametrize("arch", ["collocated", "disaggregated"])
def test_what_solve_promises_is_certified(designed, arch):
    found = designed if arch == "collocated" else design(MODEL, mixed(), arch=arch, loads=zipf_loads(MODEL, 0.8))
    d, best = found.deployment, found.chosen
    requests = best.requests_per_group * best.shape.data
    seconds = seconds_of_requests(MODEL, d.cluster, d.shape, d.traffic, requests, peak=found.peak)
    assert 0 < seconds <= 1 / best.tokens_per_second_per_user * (1 + 1e-9)
    fewer = seconds_of_requests(MODEL, d.cluster, d.shape, d.traffic, requests // 2, peak=found.peak)
    assert fewer < seconds
    full = requests_that_fit(MODEL, d.plan.pages_per_rank, d.traffic) * best.shape.data
    assert seconds_of_requests(MODEL, d.cluster, d.shape, d.traffic, full + 1, peak=found.peak) == np.inf
    losses = LossModel(d, one_front=False)
    levels = ServiceLevels(tpot_ms=1e3 / best.tokens_per_second_per_user * (1 + 1e-9))
    verdict = certify(losses, Terms(survive=FaultTolerance(ranks=0), levels=levels, requests=requests))
    assert verdict.holds, verdict.missed


@pytest.mark.parametrize("mode", MODES)
def test_rebalancing_keeps_a_placement_by_speed(designed, mode):
    d = designed.deployment
    speed = placement_speeds(MODEL, d.cluster, d.shape, d.traffic.context)
    done = rebalance(d.plan, d.load_array(), mode=mode, speed=speed)
    assert done.before == pytest.approx(peak_load(d.plan, d.load_array(), speed))
    assert done.after == pytest.approx(peak_load(done.plan, d.load_array(), speed))
    assert (done.after <= done.before + 1e-12).all()
    other = zipf_loads(MODEL, 0.8)[:, ::-1]
    shares = other / other.sum(axis=1, keepdims=True)
    moved = rebalance(d.plan, shares, mode=mode, speed=speed)
    assert peak_load(moved.plan, shares, speed).mean() < peak_load(d.plan, shares, speed).mean()


def test_the_chosen_plan_is_on_the_front_of_its_trade_off(designed):
    best = designed.chosen
    own = decode_speed(best.shape, best.requests_per_group, best.step, MODEL.kept)
    better = [p for p in designed.pareto if p["per_user"] >= own["per_user"] * (1 - 1e-9)]
    assert max(p["per_device"] for p in better) >= own["per_device"] * (1 - 1e-9)


@pytest.mark.parametrize(
    ("cluster", "why"),
    [
        ({"hosts": [{"count": 1, "devices": 2}, {"count": 1, "devices": 2, "preset": "h100"}]}, "need a preset each"),
        ({"hosts": [{"count": 1, "devices": 2, "preset": "h101"}]}, "h101"),
        (
            {
                "hardware": {"preset": "h100"},
                "devices": [{"id": 0, "host": "a"}, {"id": 1, "host": "a", "preset": "h200"}],
            },
            "a host has one kind",
        ),
        ({"hardware": {"preset": "h100"}, "hosts": [*HOSTS[:1], {**HOSTS[1], "preset": "v5e"}]}, "engine"),
    ],
)
def test_a_wrong_mix_says_so(cluster, why):
    with pytest.raises(InputError, match=why):
        cluster_from(cluster, "mixed.toml")


def test_the_commands_take_a_mixed_cluster(tmp_path, capsys):
    file, plan = tmp_path / "mixed.toml", str(tmp_path / "plan.json")
    file.write_text(
        'name = "mixed"\n[hardware]\npreset = "h100"\n[[hosts]]\ncount = 1\ndevices = 4\n'
        '[[hosts]]\ncount = 1\ndevices = 4\npreset = "b200"\n'
    )
    assert main(["solve", "qwen3-30b-a3b", str(file), "--skew", "0.8", "--out", plan]) == 0
    shown = capsys.readouterr().out
    assert "h100: " in shown
    assert "b200: " in shown
    assert "chip h100+b200" in shown
    words = " ".join(shown.split())
    assert "4 h100 of 80.0 GB each, 4 b200 of" in words
    assert "memory of a device of the smallest kind" in words
    assert "x its share by speed" in words
    loads = tmp_path / "loads.json"
    loads.write_text(json.dumps({"loads": zipf_loads(read_model("qwen3-30b-a3b"), 0.8)[:, ::-1].tolist()}))
    after = str(tmp_path / "after.json")
    assert main(["rebalance", plan, str(loads), "--out", after, "--json"]) == 0
    found, d = json.loads(capsys.readouterr().out), read_deployment(after)
    speed = rank_speeds(d.workload, d.cluster, d.shape, d.traffic.context)
    assert found["peak_after"] == pytest.approx(peak_load(d.plan, d.load_array(), speed))
    html = tmp_path / "report.html"
    assert main(["report", plan, "--html", str(html)]) == 0
    assert "Memory of a device of the smallest kind" in html.read_text()
    capsys.readouterr()
    assert main(["degrade", plan, "--json"]) == 0
    assert all(each["survivable"] for each in json.loads(capsys.readouterr().out)["losses"] if each["kind"] == "rank")
    assert main(["solve", "qwen3-30b-a3b", str(file), "--engine", "jax"]) == 0


@given(st.lists(st.floats(0.2, 5.0), min_size=2, max_size=40), st.integers(1, 12), st.integers(1, 200), st.booleans())
def test_slots_follow_speed_and_hold_every_expert_as_often_as_full_ranks_would(speeds, slots, experts, protect):
    speed = np.array(speeds) / np.mean(speeds)
    if len(speed) * slots < experts:
        return
    room = slots_by_speed(speed, slots, experts, protect=protect)
    twice = protect and len(speed) * slots >= 2 * experts
    assert room.sum() >= (2 if twice else 1) * experts
    assert room.max() <= slots
    faster = np.argsort(speed)
    assert (np.diff(room[faster]) >= -1).all()


def test_even_traffic_follows_speed_where_slots_leave_room_for_it():
    hosts = [{"count": 1, "devices": 8}, {"count": 1, "devices": 4, "preset": "gb200"}]
    cluster = cluster_from({"name": "uneven", "hardware": {"preset": "h100"}, "hosts": hosts}, "uneven.toml")
    found = design(read_model("qwen3-30b-a3b"), cluster)
    filled = (found.deployment.plan.slots_by_rank() >= 0).sum(axis=2).mean(axis=0)
    assert filled[8:].min() > 1.5 * filled[:8].max()
    assert found.peak < 1.1


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_request_rate_is_served_by_all_kinds_and_faster_for_a_user_than_at_full_load(share):
    shape = design(MODEL, read_cluster("h100:4x8"), tensor=1, slots=8).chosen.shape
    full = assess_kinds(MODEL, mixed(), shape, Traffic())
    rps = share * full.tokens_per_second / Traffic().output
    found = assess_kinds(MODEL, mixed(), shape, Traffic(rps=rps))
    slow = assess(MODEL, mixed(), shape, Traffic(rps=rps))
    assert not found.reason
    assert found.tokens_per_second >= rps * Traffic().output
    assert found.tokens_per_second_per_user >= full.tokens_per_second_per_user
    assert slow.reason or found.tokens_per_second_per_user >= slow.tokens_per_second_per_user
    assert "asked" in assess_kinds(MODEL, mixed(), shape, Traffic(rps=2 * rps / share)).reason
