"""Laws of clusters with devices of several kinds: what they reach lies between their kinds, and faster ones do more."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from planner import InputError
from planner.cli.main import main
from planner.cost.design import design
from planner.cost.mixed import assess_kinds, expert_speeds, group_kinds, rank_speeds
from planner.failures.loss_model import LossModel
from planner.inputs.cluster import Cluster, cluster_from, read_cluster, slowest
from planner.inputs.published import read_model
from planner.inputs.traffic import Traffic
from planner.plan.deployment import Deployment
from planner.plan.expert_loads import zipf_loads
from planner.solver.balance import peak_load, relative_rank_loads

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
    assert requests["h100"] < requests["b200"]
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
    assert main(["degrade", plan, "--json"]) == 0
    assert all(each["survivable"] for each in json.loads(capsys.readouterr().out)["losses"] if each["kind"] == "rank")
    assert main(["solve", "qwen3-30b-a3b", str(file), "--engine", "jax"]) == 0
