"""Buckets chosen of counts are the best there are, cover everything, and are never worse than those given."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner.cost import buckets
from planner.cost.buckets import (
    HEDGE,
    StepCounts,
    StepDemand,
    buckets_to_serve,
    choose_buckets,
    computed_rows,
    covering_bucket,
    largest_bucket,
    padding_share,
    read_counts,
    rows_of,
)
from planner.errors import InputError

GIVEN = ((2, 0), (8, 0), (32, 0), (8, 2), (32, 8))


def want_of(steps: int, ranks: int = 4, filled: int = 1) -> StepDemand:
    return StepDemand(steps, ranks * steps, filled * steps)


@st.composite
def counted(draw, most_rows: int = 40, most_tiles: int = 9, points: int = 12) -> StepCounts:
    wants = st.tuples(st.integers(0, most_rows), st.integers(0, most_tiles)).filter(any)
    return StepCounts(draw(st.dictionaries(wants, st.integers(1, 500).map(want_of), max_size=points)))


@st.composite
def given_sets(draw, most_rows: int = 40, most_tiles: int = 9) -> tuple[buckets.Bucket, ...]:
    some = draw(st.lists(st.tuples(st.integers(0, most_rows), st.integers(0, most_tiles)).filter(any), max_size=4))
    return tuple(dict.fromkeys([*some, largest_bucket([*some, (1, 1)])]))


@given(counted(), given_sets())
@settings(deadline=None)
def test_the_largest_is_covered_and_nothing_is_worse_than_what_was_given(counts, base):
    chosen = choose_buckets(counts, base).buckets
    assert len(chosen) <= len(base)
    assert largest_bucket(chosen) == largest_bucket(base)
    assert largest_bucket(base) in chosen
    for want in itertools.product(range(largest_bucket(base)[0] + 1), range(largest_bucket(base)[1] + 1)):
        covering_bucket(chosen, want)
    assert computed_rows(counts, chosen) <= computed_rows(counts, base)


@given(counted(), given_sets())
@settings(deadline=None)
def test_where_not_everything_can_be_looked_at_the_same_holds(counts, base):
    patched, buckets.SEARCHED = buckets.SEARCHED, -1
    try:
        found = choose_buckets(counts, base)
    finally:
        buckets.SEARCHED = patched
    assert not found.exact
    assert len(found.buckets) <= len(base)
    assert largest_bucket(base) in found.buckets
    assert computed_rows(counts, found.buckets) <= computed_rows(counts, base)


def cost(counts: StepCounts, base, chosen) -> float:
    """Rows computed for the counts, and for the given buckets as far as they are hedged."""
    most = largest_bucket(base)
    ranks = sum(want.ranks for want in counts.wanted.values())
    hedged = HEDGE * max(ranks, 1) / len(base) * sum(rows_of(covering_bucket(chosen, b)) for b in base)
    within = {b: (min(b[0], most[0]), min(b[1], most[1])) for b in counts.wanted}
    return hedged + sum(w.ranks * rows_of(covering_bucket(chosen, within[b])) for b, w in counts.wanted.items())


@given(counted(most_rows=4, most_tiles=2, points=6), given_sets(most_rows=4, most_tiles=2))
@settings(deadline=None, max_examples=60)
@example(StepCounts({(1, 0): want_of(9), (3, 1): want_of(5), (2, 2): want_of(1)}), ((2, 0), (4, 0), (4, 2)))
def test_no_other_choice_is_better(counts, base):
    found = choose_buckets(counts, base)
    most = largest_bucket(base)
    every = [b for b in itertools.product(range(most[0] + 1), range(most[1] + 1)) if b != most]
    best = min(
        cost(counts, base, (*some, most)) for size in range(len(base)) for some in itertools.combinations(every, size)
    )
    assert found.exact
    assert cost(counts, base, found.buckets) == pytest.approx(best)


@given(counted(), st.integers(1, 6))
@settings(deadline=None)
def test_more_buckets_never_cost_more(counts, count):
    fewer, more = (choose_buckets(counts, GIVEN, n).buckets for n in (count, count + 1))
    assert len(fewer) <= count
    assert cost(counts, GIVEN, more) <= cost(counts, GIVEN, fewer) * (1 + 1e-9)


def test_what_steps_want_most_gets_a_bucket_of_its_own():
    counts = StepCounts({(5, 0): want_of(900, filled=20), (1, 3): want_of(100, filled=300), (30, 8): want_of(1)})
    chosen = choose_buckets(counts, GIVEN).buckets
    assert {(5, 0), (1, 3), (32, 8)} <= set(chosen)
    assert padding_share(counts, chosen) < padding_share(counts, GIVEN) - 0.2
    assert padding_share(StepCounts({}), GIVEN) == 0


@given(counted(), st.integers(0, 3000), st.sampled_from([0.0, 0.05, 0.5]))
@settings(deadline=None)
def test_a_choice_stays_until_another_saves_enough(counts, steps, saves):
    first = buckets_to_serve(counts, GIVEN, steps=steps, saves=saves)
    proposed = choose_buckets(counts, GIVEN).buckets
    if counts.steps < steps:
        assert first == GIVEN
    else:
        assert computed_rows(counts, first) <= computed_rows(counts, GIVEN)
        assert first in (GIVEN, proposed)
        assert first == GIVEN or computed_rows(counts, first) <= (1 - saves) * computed_rows(counts, GIVEN)
    kept = StepCounts(counts.wanted, chosen=first)
    again = buckets_to_serve(kept, GIVEN, steps=steps, saves=max(saves, 0.01))
    assert again == first or computed_rows(counts, again) < computed_rows(counts, first)


def test_a_choice_for_another_largest_step_is_void():
    assert buckets_to_serve(StepCounts({}, chosen=((1, 0), (16, 4))), GIVEN, steps=10, saves=0.1) == GIVEN
    kept = ((1, 0), (32, 8))
    assert buckets_to_serve(StepCounts({}, chosen=kept), GIVEN, steps=10, saves=0.1) == kept


@given(counted(), counted(), st.integers(1, 500))
def test_counts_are_read_back_added_up_and_fade(a, b, most):
    both = a.merged(b.wanted)
    assert StepCounts.from_json(both.to_json()) == both
    assert both.steps == a.steps + b.steps
    faded = both.scaled_to(most)
    assert faded.steps <= most or both.steps <= most
    assert set(faded.wanted) <= set(both.wanted)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"form": 2, "about": {}, "served": [], "chosen": [], "wanted": []}',
        '{"form": 1, "about": {}, "served": [], "chosen": [], "wanted": [[1, 2, 3]]}',
        '{"form": 1, "about": {}, "served": [], "chosen": [], "wanted": [[1, -2, 3, 3, 3]]}',
        '{"form": 1, "about": {}, "served": [], "chosen": [[1]], "wanted": []}',
        '{"form": 1, "about": 7, "served": [], "chosen": [], "wanted": []}',
    ],
)
def test_anything_else_is_no_counts(text, tmp_path):
    with pytest.raises(InputError, match="no counts of steps"):
        StepCounts.from_json(text)
    file = tmp_path / "counts.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"counts\.json: no counts"):
        read_counts(str(file))
    with pytest.raises(InputError, match="cannot read"):
        read_counts(str(tmp_path / "none.json"))


@pytest.mark.parametrize("text", ["", "2", "2,x", "32,0;8,2", "0,0;8,2", "-1,2"])
def test_buckets_that_cannot_be_are_refused(text):
    with pytest.raises(InputError, match="bucket"):
        buckets.read_buckets(text)
