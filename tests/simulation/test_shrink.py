"""Scenarios that break a law are made smaller, and still break it."""

import dataclasses

from simulation.scenario import Fault, draw
from simulation.shrink import shrink


def test_only_what_breaks_the_law_is_left() -> None:
    scenario = draw(2, "safety")
    faults = tuple(Fault(at=float(i), kind="crash" if i == 7 else "slow", rank=i % 2) for i in range(20))
    scenario = dataclasses.replace(scenario, faults=faults)

    def fails(candidate) -> bool:
        return any(fault.kind == "crash" for fault in candidate.faults) and len(candidate.clients) > 0

    small = shrink(scenario, fails)
    assert fails(small)
    assert [fault.kind for fault in small.faults] == ["crash"]
    assert len(small.clients) == 1
    assert not any(share for name, share in small.rates.items() if name != "late_s")


def test_a_scenario_is_given_back_when_nothing_smaller_fails() -> None:
    scenario = draw(2, "safety")
    small = shrink(scenario, lambda candidate: candidate == scenario)
    assert dataclasses.replace(small, kinds=scenario.kinds) == scenario
