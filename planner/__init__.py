"""The planner: meshes, expert placement and the cost of every loss, as pure functions on arrays (no JAX, no clock).

>>> from planner import Cluster, Workload, solve
>>> model = Workload(moe_layers=2, experts=8, experts_per_token=2, expert_bytes=1000)
>>> plan = solve(model, Cluster.local(4))
>>> plan.slots_per_rank
3

A name is imported when it is first used: the settings of a server read inputs of the planner, and need no NumPy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.errors import InputError, InvalidPlan, NoFeasiblePlan, PlannerError
    from planner.inputs.cluster import Cluster, Device, Hardware
    from planner.inputs.workload import Workload
    from planner.plan.moves import Move, moves
    from planner.plan.plan import Figure, Plan, PlannedRank
    from planner.solver.lattice import Lattice, build_lattice
    from planner.solver.problem import Problem

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

_MODULES = {
    "planner.errors": ("InputError", "InvalidPlan", "NoFeasiblePlan", "PlannerError"),
    "planner.inputs.cluster": ("Cluster", "Device", "Hardware"),
    "planner.inputs.workload": ("Workload",),
    "planner.plan.moves": ("Move", "moves"),
    "planner.plan.plan": ("Figure", "Plan", "PlannedRank"),
    "planner.solver.lattice": ("Lattice", "build_lattice"),
    "planner.solver.problem": ("Problem",),
}
"""Names by the module that defines them."""
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def solve(workload: "Workload", cluster: "Cluster", **more: Any) -> "Plan":
    """The plan for `Problem(workload=workload, cluster=cluster, **more)`, in one call."""
    from planner.solver.problem import Problem  # here, as above
    from planner.solver.solve import solve

    return solve(Problem(workload=workload, cluster=cluster, **more))


def __getattr__(name: str) -> Any:
    """The public name, or the package or module that has some, imported at its first use. Raises AttributeError."""
    if any(module.split(".")[1] == name for module in _MODULES):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
