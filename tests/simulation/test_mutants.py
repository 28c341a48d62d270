"""Mutants of the rules of recovery: each still applies, and the simulator finds them."""

import pytest

from simulation.mutants import MUTANTS, seeds_to_find
from simulation.substitutions import replaced

QUICKLY_FOUND = ("lost_page", "losses_swallowed")
"""Mutants that few seeds find."""
MOST = 40


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_what_there_is_and_is_undone(mutant) -> None:
    changes = mutant.changes()
    assert changes
    before = [owner.__dict__[name] for owner, name, _ in changes]
    with replaced(changes):
        assert all(owner.__dict__[name] is value for owner, name, value in changes)
    assert [owner.__dict__[name] for owner, name, _ in changes] == before


def test_there_are_enough_of_them() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 15


@pytest.mark.parametrize("name", QUICKLY_FOUND)
def test_the_simulator_finds_mutants(name: str) -> None:
    mutant = next(each for each in MUTANTS if each.name == name)
    seeds, law = seeds_to_find(mutant, MOST)
    assert seeds is not None, f"none of {MOST} seeds finds {name}"
    assert law
