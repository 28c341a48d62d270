"""`moejax plan diff`: the moves between two plans, of one mesh or of pools, compared with a fresh placement."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from planner.cli.command import CommandResult
from planner.cli.report import transfer_report
from planner.cost.throughput import gb
from planner.plan.deployment import Deployment
from planner.plan.plan import Plan
from planner.plan.pools import AnyDeployment, PooledDeployment, read_any_deployment
from planner.plan.transfer import Transfer, transfer
from planner.solver.problem import Problem
from planner.solver.shapes import without_memory_limit
from planner.solver.solve import solve


def diff(options: Namespace) -> CommandResult:
    """`diff PLAN_A PLAN_B`."""
    before, after = read_any_deployment(options.plan_a), read_any_deployment(options.plan_b)
    moved = transfer_to(after, whole_plan(before))
    data, lines = moved.to_dict(), transfer_report(moved).split("\n")
    if isinstance(after, PooledDeployment):
        size, data["pools"] = after.decode.workload.expert_bytes, {}
        for name, pool in after.pools().items():
            count = sum(move.rank in pool.plan.rank_ids for move in moved.moves)
            data["pools"][name] = {"moves": count, "bytes": count * size}
            lines.insert(len(data["pools"]), f"  {name}: {count} experts, {gb(count * size)}")
    return CommandResult(data=data, text="\n".join(lines))


def transfer_to(deployment: AnyDeployment, old: Plan) -> Transfer:
    """The transfer from a plan to that of a deployment, compared with a fresh placement on the same ranks."""
    if isinstance(deployment, PooledDeployment):
        one, naive = deployment.decode, deployment.each(lambda pool: replace(pool, plan=_fresh(pool))).whole
    else:
        one, naive = deployment, _fresh(deployment)
    size, hardware = one.workload.expert_bytes, one.cluster.hardware
    return transfer(old, whole_plan(deployment), expert_bytes=size, hardware=hardware, naive=naive)


def whole_plan(deployment: AnyDeployment) -> Plan:
    """All ranks of a deployment with their experts as one plan."""
    return deployment.whole if isinstance(deployment, PooledDeployment) else deployment.plan


def _fresh(d: Deployment) -> Plan:
    """A placement on the ranks of a deployment that knows of none before."""
    problem = Problem(
        workload=d.workload,
        cluster=without_memory_limit(d.cluster),
        alive=d.plan.rank_ids,
        slots_per_rank=d.plan.slots_per_rank,
        roles={r.id: r.role for r in d.plan.ranks},
        loads=d.load_array(),
    )
    return solve(problem)
