"""The record of a range of seeds: a part that has run with this code does not run again, whatever the range."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import simulation.__main__ as command
from simulation.figures import Figures, Record, code_digest, parts, total

ROOT = Path(__file__).parents[2]


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 1500))
def test_parts_are_a_range_and_their_borders_those_of_every_range(first: int, seeds: int, size: int) -> None:
    found = parts(first, seeds, size)
    ran = [seed for start, number in found for seed in range(start, start + number)]
    assert ran == list(range(first, first + seeds))
    assert all(start % size == 0 for start, _ in found[1:])
    assert all(number <= size for _, number in found)


def test_a_part_that_has_run_counts_for_the_same_code_and_modes_alone(tmp_path: Path) -> None:
    file = tmp_path / "record"
    figures = Figures(seeds=3, seconds=1.5, tokens=7, faults={"crash": 2}, failing=[{"seed": 1}])
    Record(file, ("safety",), "a").add(4, 3, figures)
    assert Record(file, ("safety",), "a").figures_of(4, 3) == figures
    assert Record(file, ("safety",), "a").figures_of(4, 2) is None
    assert Record(file, ("safety",), "b").figures_of(4, 3) is None
    assert Record(file, ("liveness",), "a").figures_of(4, 3) is None


def test_a_line_that_was_cut_short_counts_as_none_and_the_next_part_has_a_line_of_its_own(tmp_path: Path) -> None:
    file, figures = tmp_path / "record", Figures(seeds=3, tokens=7)
    for first in (0, 3):
        Record(file, ("safety",), "a").add(first, 3, figures)
    file.write_text(file.read_text()[:-9])
    again = Record(file, ("safety",), "a")
    assert (again.figures_of(0, 3), again.figures_of(3, 3)) == (figures, None)
    again.add(3, 3, figures)
    whole = Record(file, ("safety",), "a")
    assert (whole.figures_of(0, 3), whole.figures_of(3, 3)) == (figures, figures)


def test_a_part_that_has_run_names_its_failing_seeds_once_more(tmp_path: Path, capsys) -> None:
    failing = [{"seed": seed, "mode": "safety", "violations": ["a token came twice"]} for seed in (1, 2)]
    record = tmp_path / "record"
    Record(record, ("safety",), code_digest(ROOT)).add(0, 3, Figures(seeds=3, failing=failing))
    assert command.main(["--seeds", "3", "--mode", "safety", "--keep-going", "--record", str(record)]) == 1
    said = capsys.readouterr().out
    for seed in (1, 2):
        assert f"seed {seed} (safety) breaks a law: a token came twice" in said
        assert f"again: python -m simulation --seed {seed} --mode safety" in said


def test_figures_add_up() -> None:
    one = Figures(seeds=1, seconds=2.0, tokens=3, virtual_seconds=4.0, faults={"crash": 1})
    two = Figures(seeds=10, seconds=20.0, tokens=30, virtual_seconds=40.0, faults={"crash": 1, "hang": 5})
    whole = total([one, two])
    assert whole == Figures(11, 22.0, 44.0, 33, {"crash": 2, "hang": 5})
    assert whole.seeds_per_minute == 30.0


def test_a_run_that_goes_on_runs_only_the_parts_that_are_left(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(command, "PART", 2)
    ran: list[int] = []
    draw = command.draw

    def drawn(seed, mode):
        ran.append(seed)
        return draw(seed, mode)

    monkeypatch.setattr(command, "draw", drawn)
    record, figures = tmp_path / "record", tmp_path / "figures"
    assert command.main(["--seeds", "3", "--record", str(record)]) == 0
    assert ran == [0, 1, 2]
    assert command.main(["--seeds", "5", "--record", str(record), "--json", str(figures)]) == 0
    assert ran == [0, 1, 2, 2, 3, 4]  # seed 2 alone is another part than seeds 2 and 3
    assert json.loads(figures.read_text())["seeds"] == 5
    assert json.loads(record.read_text().splitlines()[0])["code"] == code_digest(ROOT)
