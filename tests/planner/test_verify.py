"""Verify compiles what the plan says, and says what is missing when it cannot."""

from __future__ import annotations

import importlib.util

import pytest

from planner import InputError, Workload, solve, verify
from planner.cluster import Cluster, read_cluster
from planner.deployment import Deployment
from planner.design import design
from planner.huggingface import read_model
from planner.verify import CompilerUnavailable, aot_problems, compile_ahead, topology_devices


def small() -> Deployment:
    workload = Workload(
        moe_layers=2,
        layers=2,
        experts=4,
        experts_per_token=1,
        expert_bytes=10_000,
        rest_bytes=100_000,
        cache_bytes_per_token=64,
        hidden_bytes=64,
        expert_flops=2 * 3 * 32 * 48,
        rest_flops=1e5,
    )
    cluster = Cluster.local(2)
    return Deployment(plan=solve(workload, cluster), workload=workload, cluster=cluster)


def test_a_topology_is_counted_or_refused():
    assert topology_devices("v5e:2x4") == 8
    assert topology_devices("v5p:2x2x4") == 16
    with pytest.raises(InputError, match="not of the form v5e:2x4"):
        topology_devices("v5e")


def test_problems_have_the_sizes_of_the_model_and_one_rank_less():
    d = design(read_model("deepseek-v3", weights="bfloat16"), read_cluster("h200:40x8")).deployment
    whole, less = aot_problems(d, "v5e:2x4")
    assert (whole["devices"], less["devices"]) == (8, 7)
    assert (whole["hidden"], whole["width"], whole["layers"]) == (7168, 2048, 58)
    assert whole["slots"] == d.plan.slots_per_rank
    assert whole["cache_elements"] == 576


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")
def test_the_step_compiles_for_this_machine():
    whole, less = compile_ahead(small(), "cpu:2")
    assert (whole["devices"], less["devices"]) == (2, 1)
    assert whole["device_bytes"] > 0
    assert whole["source"] == "aot"


def test_without_the_compiler_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(verify, "PROGRAM", "benchmarks.no_such_program")
    with pytest.raises(CompilerUnavailable, match=r"No module named .*pip install libtpu"):
        compile_ahead(small(), "cpu:2")
