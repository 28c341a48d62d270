"""Measures the time of plans and forecasts, and the quality of placements.

    python -m benchmarks.planner [--json FILE] [--loads NAME=FILE ...] [--quick]

`cases` are the three clusters of the goals: seconds to solve (every shape compared, experts placed) and to
forecast every single loss, on the wall and of this process; the part of single losses survived without a
store, and the hottest rank's load over the mean on the worst layer, both also for EPLB's placement at the
same slots and loads. `balance` compares the two on Zipf loads, on router loads of this repository's models
(`configs/models/loads`) and on those of `--loads` (JSON [moe_layers][experts]). `growth` is seconds against
devices and experts. Loads of the cases are Zipf with exponent 0.8, in another order on each layer.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.eplb import eplb_place
from planner import Cluster, Plan, Workload, solve
from planner.cost.design import design
from planner.failures.loss_forecast import forecast_losses
from planner.failures.loss_model import MEANS, LossModel
from planner.inputs.cluster import read_cluster
from planner.inputs.published import MODELS, read_model
from planner.plan.deployment import Deployment, FaultTolerance
from planner.plan.expert_loads import read_loads, zipf_loads
from planner.plan.plan import as_tuples
from planner.solver.balance import peak_load, peak_over_mean
from planner.solver.placement import place_afresh

SKEW = 0.8
GOALS = {"deepseek-v3 on 320": {"solve_s": 2.0, "degrade_s": 5.0}}
FROM_MEMORY = [m for m in MEANS if m not in ("store", "mask", "regrow")]


def thousand_experts() -> Workload:
    """Like DeepSeek-V3, with four times the experts at a quarter of the size."""
    v3 = read_model("deepseek-v3")
    return replace(
        v3,
        name="1000-experts",
        moe_layers=60,
        experts=1000,
        expert_bytes=v3.expert_bytes // 4,
        experts_per_token=8,
    )


def yardstick(deployment: Deployment) -> Plan:
    """EPLB's placement for the same ranks, slots and loads."""
    plan = deployment.plan
    table = eplb_place(deployment.load_array(), len(plan.expert_ranks), plan.slots_per_rank)
    return replace(plan, slots=as_tuples(table.reshape(plan.moe_layers, -1)), parity=())


def from_memory(deployment: Deployment) -> float:
    """Part of single-rank losses survived by copies and parity alone."""
    outcomes, _ = forecast_losses(LossModel(deployment, means=FROM_MEMORY), kinds=["rank"])
    return sum(o.survivable for o in outcomes) / len(outcomes)


def case(name: str, workload: Workload, cluster: Cluster, **options) -> dict:
    """One row of `cases`."""
    loads = zipf_loads(workload, SKEW)
    start, cpu = time.perf_counter(), time.process_time()
    deployment = design(workload, cluster, loads=loads, **options).deployment
    solved, cpu_solved = time.perf_counter(), time.process_time()
    forecast_losses(LossModel(deployment), kinds=["rank"])
    degraded, cpu_degraded = time.perf_counter(), time.process_time()
    other = replace(deployment, plan=yardstick(deployment))
    return {
        "name": name,
        "devices": len(cluster.devices),
        "experts": workload.experts,
        "slots_per_rank": deployment.plan.slots_per_rank,
        "solve_s": solved - start,
        "degrade_s": degraded - solved,
        "solve_cpu_s": cpu_solved - cpu,
        "degrade_cpu_s": cpu_degraded - cpu_solved,
        "survivable": from_memory(deployment),
        "survivable_eplb": from_memory(other),
        "peak_load": float(peak_load(deployment.plan, loads).max()),
        "peak_load_eplb": float(peak_load(other.plan, loads).max()),
    }


def cases(quick: bool) -> list[dict]:
    """The three clusters of the goals."""
    rows = [
        case("mixtral-8x7b on 8", read_model("mixtral-8x7b"), read_cluster("h100"), slots=3),
        case(
            "deepseek-v3 on 320",
            read_model("deepseek-v3"),
            read_cluster("h200:40x8"),
            survive=FaultTolerance(ranks=1, hosts=1),
        ),
    ]
    if not quick:
        rows.append(case("1000 experts on 10000", thousand_experts(), read_cluster("h200:1250x8"), slots=1))
    return rows


def compare(name: str, loads: np.ndarray, ranks: int, slots: int, per_host: int = 4) -> dict:
    """Both placements on `loads` [moe_layers, experts]: hottest rank, and losses survived from memory."""
    workload = Workload(name=name, moe_layers=len(loads), experts=loads.shape[1], experts_per_token=1, expert_bytes=1)
    hosts = [f"host{i // per_host}" for i in range(ranks)]
    cluster = Cluster.local(ranks, hosts=hosts)
    share = loads / loads.sum(axis=1, keepdims=True)
    rows = tuple(map(tuple, share.tolist()))
    found = {"name": name, "experts": loads.shape[1], "ranks": ranks, "slots_per_rank": slots}
    for protect in ("copies", "parity"):
        plan = solve(workload, cluster, slots_per_rank=slots, loads=share, protect=protect)
        deployment = Deployment(plan=plan, workload=workload, cluster=cluster, loads=rows)
        found[protect] = {
            "peak_load": float(peak_load(plan, share).max()),
            "survivable": from_memory(deployment),
        }
    other = replace(deployment, plan=yardstick(deployment))
    found["eplb"] = {"peak_load": float(peak_load(other.plan, share).max()), "survivable": from_memory(other)}
    return found


def balance(measured: dict[str, str]) -> list[dict]:
    """Comparisons on Zipf loads, and on measured router loads of the files named."""
    rows = []
    for experts, ranks, slots in ((8, 8, 3), (64, 8, 18), (64, 16, 10), (128, 32, 10), (256, 64, 10)):
        for exponent in (0.3, 0.6, 1.0):
            workload = Workload(moe_layers=8, experts=experts, experts_per_token=1, expert_bytes=1)
            loads, per_host = zipf_loads(workload, exponent), 8 if ranks == 8 else 4
            rows.append(compare(f"zipf {exponent} x {experts}", loads, ranks, slots, per_host=per_host))
    for name, path in measured.items():
        data = json.loads(Path(path).read_text())
        data = data["loads"] if isinstance(data, dict) else data
        workload = Workload(moe_layers=len(data), experts=len(data[0]), experts_per_token=1, expert_bytes=1)
        loads = np.array(read_loads(path, workload))
        for ranks in (4, 8):
            rows.append(compare(name, loads, ranks, 2 * -(-workload.experts // ranks) + 1, per_host=ranks))
    return rows


def growth(quick: bool) -> list[dict]:
    """Seconds of a placement against devices and experts, two slots a rank or just enough."""
    rows = []
    sizes = [(256, n) for n in (16, 64, 256, 1024)] + [(e, 256) for e in (64, 1024)]
    for experts, devices in sizes[: 3 if quick else None]:
        workload = Workload(moe_layers=32, experts=experts, experts_per_token=1, expert_bytes=1)
        loads, domain = zipf_loads(workload, SKEW), np.arange(devices) // 8
        slots = max(2, -(-2 * experts // devices) + 1)
        start = time.perf_counter()
        table, _ = place_afresh(loads, domain, slots)
        rows.append(
            {
                "experts": experts,
                "devices": devices,
                "slots_per_rank": slots,
                "place_s": time.perf_counter() - start,
                "peak_load": float(peak_over_mean(table, loads).max()),
            }
        )
    return rows


def main() -> None:
    """Run everything, print it, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--loads", nargs="*", default=[], metavar="NAME=FILE", help="measured router loads")
    parser.add_argument("--quick", action="store_true", help="leave out the largest cases")
    options = parser.parse_args()
    shipped = {path.stem: str(path) for path in sorted((MODELS / "loads").glob("*.json"))}
    measured = shipped | dict(item.split("=", 1) for item in options.loads)
    result = {"cases": cases(options.quick), "balance": balance(measured), "growth": growth(options.quick)}
    for row in result["cases"]:
        print(
            f"{row['name']:<24} solve {row['solve_s']:6.2f} s, all single losses {row['degrade_s']:6.2f} s "
            f"(of this process {row['solve_cpu_s']:.2f} and {row['degrade_cpu_s']:.2f}); "
            f"survivable from memory {row['survivable']:.1%} (EPLB {row['survivable_eplb']:.1%}), "
            f"hottest rank {row['peak_load']:.4f} (EPLB {row['peak_load_eplb']:.4f})"
        )
        for figure, goal in GOALS.get(row["name"], {}).items():
            verdict = "reached" if row[figure] <= goal else "missed"
            print(f"  {figure} {row[figure]:.2f}, goal {goal:g}: {verdict}")
    for row in result["balance"]:
        ours, parity, eplb = row["copies"], row["parity"], row["eplb"]
        print(
            f"{row['name']:<16} {row['ranks']:>3} x {row['slots_per_rank']:<3} "
            f"hottest {ours['peak_load']:.4f}, with parity {parity['peak_load']:.4f}, "
            f"EPLB {eplb['peak_load']:.4f}; survivable "
            f"{ours['survivable']:.0%}, {parity['survivable']:.0%}, {eplb['survivable']:.0%}"
        )
    for row in result["growth"]:
        print(f"{row['experts']:>5} experts on {row['devices']:>5} devices: placed in {row['place_s']:.2f} s")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
