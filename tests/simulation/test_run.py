"""Seeds of the simulator: whatever happens, no law is broken, and a seed decides everything."""

import dataclasses
import os

import pytest

from simulation.run import run
from simulation.scenario import FAULTS, Fault, Scenario, draw

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "10"))
"""Seeds of each mode; `scripts/test` runs a thousand beside these tests."""


@pytest.mark.parametrize("mode", ["safety", "liveness"])
def test_no_seed_breaks_a_law(mode) -> None:
    for seed in range(SEEDS):
        outcome = run(draw(seed, mode))
        assert not outcome.violations, f"python -m simulation --seed {seed} --mode {mode}: {outcome.violations}"


def test_every_kind_of_fault_is_drawn_and_each_scenario_has_few() -> None:
    scenarios = [draw(seed, "safety") for seed in range(200)]
    assert {fault.kind for scenario in scenarios for fault in scenario.faults} == FAULTS.keys()
    assert all(scenario.kinds.keys() < FAULTS.keys() for scenario in scenarios)


def test_a_seed_is_replayed_exactly() -> None:
    first, second = run(draw(3, "safety")), run(draw(3, "safety"))
    assert first.trace == second.trace
    assert first == second


def calm(seed: int, *faults: Fault) -> Scenario:
    """A scenario with these faults alone, whose clients wait for their answers."""
    scenario = draw(seed, "liveness")
    rates = {name: 0.01 if name == "late_s" else 0.0 for name in scenario.rates}
    patient = [dataclasses.replace(client, timeout_s=None, leaves=None, aborts=None) for client in scenario.clients]
    return dataclasses.replace(scenario, faults=faults, rates=rates, clients=tuple(patient))


def test_a_server_without_faults_serves_every_call() -> None:
    outcome = run(calm(1))
    assert not outcome.violations
    assert outcome.tokens > 0
    assert not any("rank_lost" in line for line in outcome.trace)


@pytest.mark.parametrize("shares_memory", [True, False])
def test_an_exchange_that_fails_while_all_ranks_live_ends_with_nobody_fenced(shares_memory) -> None:
    scenario = calm(1, *(Fault(at, "exchange", value=0.9) for at in (1.5, 3.0)))
    outcome = run(dataclasses.replace(scenario, shares_memory=shares_memory))
    assert not outcome.violations
    assert outcome.happened == {"exchange": 2}
    assert not any("event rank_lost" in line or "event suspected" in line for line in outcome.trace)
    assert any("event step_failed" in line for line in outcome.trace)


@pytest.mark.parametrize(("seconds", "lost"), [(1.2, False), (3.0, True)])
def test_a_rank_is_given_longer_while_its_process_waits_for_a_processor_and_not_for_ever(seconds, lost) -> None:
    outcome = run(calm(1, Fault(1.5, "starved", rank=0, seconds=seconds)))
    assert not outcome.violations
    assert outcome.happened == {"starved": 1}
    assert any("event starved" in line for line in outcome.trace)
    assert any("event rank_lost" in line for line in outcome.trace) == lost


@pytest.mark.parametrize("shares_memory", [True, False])
def test_a_rank_that_is_stuck_in_a_step_is_lost_and_none_that_waits_for_it(shares_memory) -> None:
    scenario = calm(1, Fault(1.9, "stuck", rank=1, value=0.9))
    outcome = run(dataclasses.replace(scenario, shares_memory=shares_memory))
    assert not outcome.violations
    assert [line.split(", cause")[0].split(", ")[-1] for line in outcome.trace if "event rank_lost" in line] == [
        "rank 1"
    ]


def test_a_rank_that_is_stuck_when_it_is_asked_to_adopt_a_plan_is_lost_by_its_limit() -> None:
    quiet = dataclasses.replace(
        calm(1, Fault(1.9, "stuck", rank=1, value=0.9), Fault(2.0, "drain", rank=0)), clients=()
    )
    outcome = run(quiet)
    assert not outcome.violations
    assert any("rank_lost" in line and "rank 1, cause command" in line for line in outcome.trace)


def test_a_rank_that_is_stuck_before_a_generation_is_formed_takes_no_other_with_it() -> None:
    faults = (Fault(1.9, "stuck", rank=1, value=0.9), Fault(1.95, "coordinator"), Fault(2.0, "crash", rank=0))
    quiet = dataclasses.replace(calm(1, *faults), clients=(), shares_memory=False)
    outcome = run(quiet)
    assert not outcome.violations
    lost = [line.split(", cause ") for line in outcome.trace if "event rank_lost" in line]
    assert [rank.split(", ")[-1] for rank, _ in lost] == ["rank 0", "rank 1"]
    assert "no answer to ping within 30 s" in lost[1][1]


@pytest.mark.parametrize("seed", range(3))
def test_whoever_dies_while_ranks_enter_a_generation_takes_no_other_with_it_for_long(seed) -> None:
    faults = (Fault(1.95, "coordinator"), Fault(2.0, "crash", rank=0))
    scenario = calm(seed, *faults)
    outcome = run(dataclasses.replace(scenario, rates=scenario.rates | {"dies_joining": 1.0}, shares_memory=False))
    assert not outcome.violations
    assert outcome.happened["dies_joining"] + outcome.happened["coordinator"] > 1
    assert not any("no answer to" in line for line in outcome.trace), "somebody waited for one that is gone"
