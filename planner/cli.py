"""`python -m planner …` and `moejax plan …`."""

from __future__ import annotations

import argparse
import sys

from planner.cluster import Cluster
from planner.errors import NoFeasiblePlan, PlannerError
from planner.plan import Plan
from planner.solve import solve
from planner.workload import Workload


def main(argv: list[str]) -> int:
    """Run one command; 0 done, 1 no feasible plan, 2 wrong input."""
    parser = argparse.ArgumentParser(prog="moejax plan", description="Meshes and expert placement.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("solve", help="a plan for a model given in numbers")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--experts", type=int, default=8)
    p.add_argument("--top", type=int, default=2)
    p.add_argument("--ranks", type=int, default=4)
    p.add_argument("--slots", type=int)
    p.add_argument("--dead", type=int, nargs="*", default=[])
    p.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    workload = Workload(
        moe_layers=options.layers, experts=options.experts, experts_per_token=options.top, expert_bytes=1
    )
    try:
        cluster = Cluster.local(options.ranks)
        plan = solve(workload, cluster, slots_per_rank=options.slots)
        if options.dead:
            alive = [r for r in cluster.ids if r not in options.dead]
            plan = solve(workload, cluster, alive=alive, previous=plan, epoch=1)
    except NoFeasiblePlan as error:
        print(error, file=sys.stderr)
        return 1
    except PlannerError as error:
        print(error, file=sys.stderr)
        return 2
    print(plan.to_json() if options.json else table(plan))
    return 0


def table(plan: Plan) -> str:
    """The slot table as text, one line per rank and the experts of each layer in its columns."""
    lines = [f"{len(plan.ranks)} ranks x {plan.slots_per_rank} slots, {plan.experts} experts"]
    for r in plan.holders:
        layers = " | ".join(" ".join(f"{e:>3}" for e in row) for row in plan.slots_of(r.id))
        lines.append(f"rank {r.id:>3} {r.host:<12} {layers}")
    return "\n".join(lines)
