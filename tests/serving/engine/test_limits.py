"""Limits: sizes that cannot work are refused, and a request has the pages and the end that they give it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.limits import Limits
from simulation.hand_model import small_limits, small_request
from tests.support.fake_engine import CONTEXT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 0}, "page_size is 0"),
        ({"max_context": 1}, "max_context is 1"),
        ({"buckets": ((4, 0),)}, "one with prefill tiles"),
        ({"buckets": ()}, "one with decode rows"),
        ({"buckets": ((4, 0), (2, 2))}, r"Add \(4, 2\)"),
    ],
)
def test_limits_that_cannot_work_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_limits(**change)


@given(st.integers(1, CONTEXT - 1), st.integers(1, CONTEXT), st.integers(1, 40))
def test_the_pages_of_a_request_hold_all_but_its_last_token_and_none_is_left_over(
    length: int, max_tokens: int, page_size: int
) -> None:
    limits: Limits = small_limits(page_size=page_size)
    request = small_request("a", range(length), max_tokens=max_tokens)
    generated = next(count for count in range(1, CONTEXT) if limits.length_reason(request, count))
    entries = length + generated - 1
    assert (limits.pages_needed(request) - 1) * page_size < entries <= limits.pages_needed(request) * page_size
    assert limits.pages_needed(request) <= limits.max_pages
