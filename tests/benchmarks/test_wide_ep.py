"""The gate of the planner on published figures of wide expert parallel deployments, to which nothing is fitted."""

from __future__ import annotations

import pytest

from benchmarks.wide_ep import RATES, PublishedRate, planned, report

FEW = 2
"""Requests a rank of which a published step is mostly neither work nor exchange (docs/results/planner_accuracy.md)."""


@pytest.mark.parametrize("row", RATES, ids=lambda row: f"{row.name} {row.requests or 'prefill'} {row.context}")
def test_a_published_rate_is_within_the_goal(row: PublishedRate):
    goal = 1.75 if row.requests == FEW else 1.25 if row.requests else 1.3
    rate, _ = planned(row)
    assert 1 / goal <= rate / row.rate <= goal


def test_the_report_has_a_line_for_each():
    assert len(report().splitlines()) == 2 + len(RATES)
