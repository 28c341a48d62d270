"""Makes a scenario that breaks a law smaller, as long as it still breaks one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

from simulation.scenario import Scenario

T = TypeVar("T")


def shrink(scenario: Scenario, fails: Callable[[Scenario], bool], *, most_runs: int = 200) -> Scenario:
    """The smallest scenario found that `fails`, in at most so many runs."""
    runs = 0

    def still_fails(candidate: Scenario) -> bool:
        nonlocal runs
        runs += 1
        return runs <= most_runs and fails(candidate)

    before = None
    while before != scenario and runs < most_runs:
        before = scenario
        for name in scenario.rates:
            calm = dataclasses.replace(scenario, rates={**scenario.rates, name: 0.0 if name != "late_s" else 0.01})
            if calm != scenario and still_fails(calm):
                scenario = calm
        scenario = _with_fewer(scenario, "faults", scenario.faults, still_fails)
        scenario = _with_fewer(scenario, "clients", scenario.clients, still_fails)
        for name in ("timeout_s", "leaves", "aborts", "rereads", "stalls"):
            plain = tuple(dataclasses.replace(client, **{name: None}) for client in scenario.clients)
            if plain != scenario.clients and still_fails(candidate := dataclasses.replace(scenario, clients=plain)):
                scenario = candidate
        for name, value in (("journal", False), ("restores_always", False), ("shares_memory", True), ("relays", False)):
            plainer = dataclasses.replace(scenario, **{name: value})
            if plainer != scenario and still_fails(plainer):
                scenario = plainer
    kinds = {fault.kind for fault in scenario.faults}
    return dataclasses.replace(scenario, kinds={kind: rate for kind, rate in scenario.kinds.items() if kind in kinds})


def _with_fewer(scenario: Scenario, name: str, items: Sequence[T], still_fails: Callable[[Scenario], bool]) -> Scenario:
    """Leave out halves of the items, then quarters, and so on to single ones."""
    size = len(items)
    while size:
        at = 0
        while at < len(items):
            fewer = (*items[:at], *items[at + size :])
            candidate = dataclasses.replace(scenario, **{name: fewer})
            if still_fails(candidate):
                scenario, items = candidate, fewer
            else:
                at += size
        size //= 2
    return scenario
