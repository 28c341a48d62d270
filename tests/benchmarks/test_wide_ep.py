"""The gate of the planner on published figures of wide expert parallel deployments, to which nothing is fitted."""

from __future__ import annotations

import pytest

from benchmarks.wide_ep import RATES, PublishedRate, planned, report

QUICKER = "DeepSeek's profile"
"""Its prefill is 1.25 times as quick as SGLang's of the same model, prompts, chips and number of ranks."""


@pytest.mark.parametrize("row", RATES, ids=lambda row: f"{row.name} {row.requests or 'prefill'} {row.context}")
def test_a_published_rate_is_within_the_goal(row: PublishedRate):
    goal = 1.25 if row.requests else 1.5 if row.name == QUICKER else 1.3
    rate, _ = planned(row)
    assert 1 / goal <= rate / row.rate <= goal


def test_the_report_has_a_line_for_each():
    assert len(report().splitlines()) == 2 + len(RATES)
