"""The planner: meshes, expert placement and the cost of every loss, as pure functions on arrays (no JAX, no clock).

>>> from planner import Cluster, Workload, solve
>>> model = Workload(moe_layers=2, experts=8, experts_per_token=2, expert_bytes=1000)
>>> plan = solve(model, Cluster.local(4))
>>> plan.slots_per_rank
3
"""

from typing import Any

from planner.errors import InputError, InvalidPlan, NoFeasiblePlan, PlannerError
from planner.inputs.cluster import Cluster, Device, Hardware
from planner.inputs.workload import Workload
from planner.plan.moves import Move, moves
from planner.plan.plan import Figure, Plan, PlannedRank
from planner.solver.lattice import Lattice, build_lattice
from planner.solver.problem import Problem
from planner.solver.solve import solve as _solve

__all__ = [
    "Cluster",
    "Device",
    "Figure",
    "Hardware",
    "InputError",
    "InvalidPlan",
    "Lattice",
    "Move",
    "NoFeasiblePlan",
    "Plan",
    "PlannedRank",
    "PlannerError",
    "Problem",
    "Workload",
    "build_lattice",
    "moves",
    "solve",
]


def solve(workload: Workload, cluster: Cluster, **more: Any) -> Plan:
    """The plan for `Problem(workload=workload, cluster=cluster, **more)`, in one call."""
    return _solve(Problem(workload=workload, cluster=cluster, **more))
