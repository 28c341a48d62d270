"""Laws of calibration: figures made by the cost model itself are found again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import Hardware, InputError, Workload, solve
from planner.cost.calibration import calibrate, read_steps
from planner.cost.roofline import step_time
from planner.inputs.cluster import Cluster
from planner.plan.deployment import Deployment


def deployment() -> Deployment:
    workload = Workload(
        moe_layers=10,
        layers=30,
        experts=8,
        experts_per_token=2,
        expert_bytes=10**6,
        rest_bytes=10**8,
        cache_bytes_per_token=1000,
        hidden_bytes=2000,
        expert_flops=2e6,
        rest_flops=2e8,
    )
    cluster = Cluster.regular("c", 1, 4, hardware=Hardware())
    return Deployment(plan=solve(workload, cluster), workload=workload, cluster=cluster)


@settings(max_examples=20)
@given(st.floats(0.3, 8), st.floats(0.5, 1.0))
def test_the_hardware_behind_the_figures_is_found_again(latency, efficiency):
    d = deployment()
    true = replace(
        d.cluster.hardware,
        collective_latency=d.cluster.hardware.collective_latency * latency,
        step_overhead=d.cluster.hardware.step_overhead * latency,
        efficiency=efficiency,
        link_bandwidth=1e30,
        network_bandwidth=1e30,
    )
    d = replace(d, cluster=replace(d.cluster, hardware=replace(true, efficiency=1.0)))
    real = replace(d.cluster, hardware=true)
    runs = [(c, step_time(d.workload, real, d.shape, c / 4, d.traffic.context).total) for c in (4, 32, 128, 512)]
    found = calibrate(d, runs)
    assert found.cluster.hardware.efficiency == pytest.approx(efficiency, rel=1e-6)
    assert all(abs(r.error) < 1e-6 for r in found.rows)


def test_a_file_that_is_no_throughput_result_is_named(tmp_path):
    file = tmp_path / "x.json"
    for content, message in (
        ("{}", "no result of benchmarks.throughput: it is an empty object"),
        ('{"runs": [{"concurrency": 1, "itl_ms": {"median": 5}}]}', "has 1 runs"),
        ("nonsense", "no result of"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=message.replace(".", r"\.")):
            read_steps(file)
    with pytest.raises(InputError, match="cannot read"):
        read_steps(tmp_path / "none.json")
