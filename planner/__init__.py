"""Which rank holds what: arithmetic on arrays. No JAX, no clock, no socket.

>>> from planner import Cluster, Workload, solve
>>> model = Workload(moe_layers=2, experts=8, experts_per_token=2, expert_bytes=1000)
>>> plan = solve(model, Cluster.local(4))
>>> plan.slots_per_rank
3
"""

from planner.cluster import Cluster, Device, Hardware
from planner.errors import InputError, InvalidPlan, NoFeasiblePlan, PlannerError
from planner.lattice import Lattice, build_lattice
from planner.moves import Move, moves
from planner.plan import Figure, Plan, RankPlace
from planner.solve import solve
from planner.workload import Workload

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
    "PlannerError",
    "RankPlace",
    "Workload",
    "build_lattice",
    "moves",
    "solve",
]
