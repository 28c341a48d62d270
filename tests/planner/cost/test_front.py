"""Laws of the front's work: the constants are those of the measurements, and more of anything takes no less."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scale_tables import fitted
from planner.cost.front import FrontCost, fewest_ranks, from_constants, measured_fronts, pace
from planner.cost.throughput import assess
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.inputs.traffic import Traffic
from planner.plan.shape import Shape
from serving.config import Settings
from serving.executor import rank_monitor
from serving.executor.rank_monitor import POLL_S

ROOT = Path(__file__).parents[3]
LARGE = read_model("deepseek-v3")
ranks = st.integers(1, 5000)


def flat(count: int) -> Shape:
    """So many ranks, each with attention of its own and its share of the experts of LARGE."""
    slots, roles = -(-LARGE.experts // count), ("collocated",) * count
    return Shape(arch="collocated", tensor=1, dense=1, slots=slots, roles=roles, groups=tuple(range(count)))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        yield path, value
    for key, part in parts or ():
        yield from leaves(part, f"{path}/{key}")


def numbers(value: Any) -> dict[str, float]:
    return {path: leaf for path, leaf in leaves(value) if isinstance(leaf, float)}


def texts(value: Any) -> dict[str, Any]:
    return {path: leaf for path, leaf in leaves(value) if not isinstance(leaf, float)}


def test_the_constants_are_those_of_the_measurements_that_docs_scale_shows():
    data = json.loads((ROOT / "docs" / "results" / "scale.json").read_text())
    made = json.loads(json.dumps(fitted(data)))
    shipped = json.loads((ROOT / "configs" / "front.json").read_text())
    assert texts(made) == texts(shipped)
    assert numbers(made) == pytest.approx(numbers(shipped), rel=1e-9)  # processors sum in other orders
    assert f"measured {made['measured']}" in (ROOT / "docs" / "scale.md").read_text()


def test_ranks_are_watched_as_often_as_the_server_looks_at_them():
    for front in (FrontCost.measured(LARGE), *(from_constants(each.constants) for each in measured_fronts())):
        few, many = front.many_ranks, front.many_ranks + 1
        assert (few, front.beat_s) == (rank_monitor.MANY_RANKS, Settings.heartbeat_s)
        looks = [front.watch_share(n) / n - front.beat / front.beat_s for n in (1, few, many, 10 * many)]
        often, seldom = (front.look / seconds for seconds in (POLL_S, rank_monitor.MANY_POLLS * POLL_S))
        assert looks == pytest.approx([often, often, seldom, seldom])
    assert FrontCost().watch_share(1000) == 0


def test_a_model_that_was_measured_has_its_own_constants():
    small, large = measured_fronts()
    assert large.pairs == LARGE.moe_layers * LARGE.experts
    assert FrontCost.measured(LARGE).adopt.at(100) == pytest.approx(from_constants(large.constants).adopt.at(100))
    few = replace(LARGE, moe_layers=1, experts=small.pairs, experts_per_token=1)
    assert FrontCost.measured(few) == from_constants(small.constants)


@given(st.integers(1, 100), st.integers(8, 1000), st.integers(8, 1000))
def test_larger_models_never_take_less_beyond_the_largest_measured(layers: int, few: int, many: int):
    few, many = sorted((few + 256, many + 256))
    a, b = (FrontCost.measured(replace(LARGE, moe_layers=58 + layers, experts=n)) for n in (few, many))
    for name in ("step", "abort", "prepare", "adopt"):
        assert getattr(a, name).at(64) <= getattr(b, name).at(64) * (1 + 1e-12)
    assert a.row >= 0


@given(ranks, st.integers(1, 400), st.floats(1e-3, 1.0))
def test_one_front_paces_the_ranks_up_to_the_most_and_no_further(n: int, each: int, step: float):
    front = FrontCost.measured(LARGE)
    found = pace(front, n, n * each, step)
    assert found.kept == (front.step_seconds(n, n * each) <= step)
    assert found.kept == (n <= found.most_ranks)
    assert front.step_seconds(found.most_ranks + 1, (found.most_ranks + 1) * each) > step
    assert found.to_dict()["front_step"] == (found.front_step if found.front_step < inf else None)


@given(ranks, st.integers(1, 400), st.floats(1e-3, 1.0), st.integers(0, 64))
def test_fronts_are_as_many_as_pace_all_ranks_and_none_where_the_model_fits_on_no_so_few(n, each, step, fewest):
    found = replace(pace(FrontCost.measured(LARGE), n, n * each, step), fewest_ranks=fewest)
    if found.fronts:
        assert (found.fronts - 1) * found.most_ranks < n <= found.fronts * found.most_ranks
        assert found.most_ranks >= fewest
    else:
        assert found.most_ranks < max(1, fewest)
    assert found.to_dict()["fronts"] == found.fronts


@pytest.mark.parametrize("chip", ["h100", "h200"])
def test_the_fewest_ranks_are_those_on_which_the_model_fits(chip):
    cluster = read_cluster(f"{chip}:4x8")
    found = [
        count
        for count in range(1, 33)
        if assess(LARGE, cluster, flat(count), Traffic(prompt=1, output=1, tpot_ms=1e9, ttft_ms=1e9)).step is not None
    ]
    assert fewest_ranks(LARGE, cluster, flat(1)) == found[0]
