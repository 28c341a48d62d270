"""Plans that were solved before in this process: the planner is pure, and many scenarios have the same problems."""

import dataclasses
import functools
from collections.abc import Hashable, Mapping
from typing import Any

from planner.errors import NoFeasiblePlan
from planner.plan.plan import Plan
from planner.solver.problem import Problem
from planner.solver.solve import solve

MOST = 20_000
"""Most plans that are kept."""
_solved: dict[Hashable, Plan | str] = {}


def solve_once(problem: Problem) -> Plan:
    """As `planner.solver.solve.solve`."""
    key = tuple(_hashable(getattr(problem, name)) for name in _fields(type(problem)))
    found = _solved.get(key)
    if found is None:
        try:
            found = solve(problem)
        except NoFeasiblePlan as error:
            found = str(error)
        if len(_solved) < MOST:
            _solved[key] = found
    if isinstance(found, str):
        raise NoFeasiblePlan(found)
    return found


def _hashable(value: Any) -> Hashable:
    """A value with the mappings and lists in it, at any depth, as tuples."""
    try:
        hash(value)
    except TypeError:
        pass
    else:
        return value
    if isinstance(value, Mapping):
        return tuple(sorted((key, _hashable(each)) for key, each in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    if dataclasses.is_dataclass(value):
        return type(value), *(_hashable(getattr(value, name)) for name in _fields(type(value)))
    return value


@functools.cache
def _fields(kind: type) -> tuple[str, ...]:
    """The names of the fields of a dataclass."""
    return tuple(field.name for field in dataclasses.fields(kind))
