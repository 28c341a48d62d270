"""Seconds that the planner takes for DeepSeek-V3 on 320 and on 10,000 devices: a plan, and the cost of each loss.

python -m benchmarks.planner_speed
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from planner.cost.design import design
from planner.cost.pools import design_pools
from planner.failures.loss_forecast import forecast_losses
from planner.failures.loss_model import LossModel
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.plan.deployment import FaultTolerance
from planner.plan.expert_loads import zipf_loads

CLUSTERS = ("h200:40x8", "h100:1250x8")


def timed(what: str, work: Callable[[], Any]) -> Any:
    """The result of `work`, once its seconds are printed."""
    clock, core = time.perf_counter(), time.process_time()
    result = work()
    print(f"{what:<32} {time.perf_counter() - clock:7.2f} s by the clock {time.process_time() - core:7.2f} s of a core")
    return result


def main() -> None:
    """Print a line for each."""
    model, survive = read_model("deepseek-v3"), FaultTolerance(ranks=1, hosts=1)
    loads = zipf_loads(model, 0.8)
    for name in CLUSTERS:
        cluster = read_cluster(name)
        found = timed(f"{name}: plan", lambda at=cluster: design(model, at, loads=loads, survive=survive))
        losses = LossModel(found.deployment)
        timed(f"{name}: every rank", lambda at=losses: forecast_losses(at, kinds=["rank"]))
        timed(f"{name}: every host", lambda at=losses: forecast_losses(at, kinds=["host"]))
    timed(f"{CLUSTERS[0]}: pools", lambda: design_pools(model, read_cluster(CLUSTERS[0])))


if __name__ == "__main__":
    main()
