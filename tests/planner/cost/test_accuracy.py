"""The gate of the planner's accuracy on measured settings, where their table is at hand, and laws of its figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from planner.cli.main import main
from planner.cost.accuracy import PAIRS, accuracy_of, error_figures
from planner.cost.measurements import read_measurements
from planner.inputs.engine import read_profile

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "silicon_sample.csv"
needs_data = pytest.mark.skipif(not DATA.is_file(), reason="the table of measured settings is not here")


@pytest.fixture(scope="module")
def result():
    return accuracy_of(read_measurements(DATA)[0], "cuda-graph")


@needs_data
def test_times_per_token_are_within_the_goal(result):
    figures = error_figures(result.tpot)
    assert figures is not None
    assert figures.count > 1500
    assert figures.factor <= 1.20
    assert figures.within_125 >= 0.75


@needs_data
@pytest.mark.parametrize("kind", ["model", "chip", "engine"])
def test_what_the_fit_has_not_seen_is_predicted_as_well(result, kind):
    labels, errors = result.labels(kind), result.left_out(kind)
    for label in set(labels):
        figures = error_figures(errors[labels == label])
        assert figures is not None
        assert figures.factor <= 1.25, label
    everything = error_figures(errors)
    assert everything is not None
    assert everything.within_125 >= 0.75


@needs_data
def test_a_model_on_a_chip_that_the_fit_has_not_seen_together_is_predicted_as_well(result):
    labels, errors = result.labels(PAIRS), result.left_out(PAIRS)
    each = {label: error_figures(errors[labels == label]) for label in set(labels)}
    everything = error_figures(errors)
    assert everything is not None
    assert everything.factor <= 1.20
    near = [figures for figures in each.values() if figures and figures.factor <= 1.25]
    assert len(near) >= 0.85 * len(each)


@needs_data
def test_full_load_and_first_tokens_are_within_the_goal(result):
    full, first = error_figures(result.full[~np.isnan(result.full)]), error_figures(result.ttft[result.settings.alone])
    assert full is not None
    assert first is not None
    assert full.factor <= 1.3
    assert first.factor <= 1.4


@needs_data
def test_the_shipped_constants_are_those_that_the_fit_gives(result):
    from benchmarks.fit_planner import profile

    made, shipped = profile(str(DATA)), read_profile("cuda-graph")[0]
    for name, each in made["constants"].items():
        assert getattr(shipped, name) == pytest.approx(each["value"], rel=0.02), name


@needs_data
def test_the_command_prints_its_tables_in_80_columns(capsys):
    assert main(["accuracy", str(DATA), "--no-refit"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["accuracy", str(DATA), "--no-refit", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["tpot"]["all"]["count"] == data["settings"]


def test_figures_of_errors_are_those_that_can_be_worked_out():
    figures = error_figures(np.log([2.0, 0.5, 1.0, 1.2]))
    assert figures is not None
    assert figures.factor == pytest.approx((2 * 2 * 1 * 1.2) ** 0.25)
    assert figures.bias == pytest.approx(1.2**0.25)
    assert (figures.within_125, figures.within_2) == (0.5, 1.0)
    assert error_figures(np.array([])) is None
