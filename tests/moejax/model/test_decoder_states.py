"""Laws of the step of models with layers whose context is a state, which cannot go back to the last draft that was
right."""

import pytest

from tests.support.decoder_models import STATES
from tests.support.step_laws import (
    check_agrees,
    check_bits,
    check_narrow_is_close,
    check_snapshots,
    check_twice,
    check_unread,
)

SLOW = ("kimi-linear", "ling")
"""Models whose rows `scripts/soak` alone compares bit by bit; `test_state_layers` holds this of every kind of layer."""
BIT_BY_BIT = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in STATES]
NARROW = (("qwen-next", "fp8"),)
"""Caches narrower than float32: read by the kernel and by the reference."""


@pytest.mark.parametrize("name", STATES)
def test_a_step_agrees_with_the_float64_reference(name: str) -> None:
    check_agrees(name, 4)


@pytest.mark.parametrize(("name", "form"), NARROW)
def test_a_step_over_a_narrow_cache_is_close_to_the_float64_reference(name: str, form: str) -> None:
    check_narrow_is_close(name, form)


@pytest.mark.parametrize("name", BIT_BY_BIT)
def test_no_bit_depends_on_ranks_buckets_neighbours_or_on_what_was_cached(name: str) -> None:
    check_bits(name)


@pytest.mark.parametrize(("name", "form"), NARROW)
def test_no_bit_of_a_narrow_cache_depends_on_them(name: str, form: str) -> None:
    check_bits(name, form)


@pytest.mark.parametrize("name", STATES)
def test_a_request_that_begins_from_a_snapshot_has_the_bits_of_one_that_computes_everything(name: str) -> None:
    check_snapshots(name)


@pytest.mark.parametrize("name", STATES)
def test_a_step_made_twice_leaves_the_cache_as_once(name: str) -> None:
    check_twice(name)


@pytest.mark.parametrize("name", STATES)
def test_rows_that_nobody_reads_end_at_their_keys_and_values_and_change_no_bit(name: str) -> None:
    check_unread(name, 4)
