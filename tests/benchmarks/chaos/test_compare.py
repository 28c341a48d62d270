"""Texts that clients received, compared with the wanted ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.chaos.compare import Difference, compare

WORDS = st.lists(st.sampled_from(["one ", "two ", "three ", "four ", "five ", "six "]), min_size=6, max_size=30)


@given(WORDS)
def test_the_wanted_text_has_no_difference(words):
    text = "".join(words)
    assert compare(text, text, ended=True) == Difference()


@given(WORDS, st.data())
def test_the_end_that_a_broken_stream_lacks_is_missing(words, data):
    text = "".join(words)
    at = data.draw(st.integers(0, len(text)))
    assert compare(text[:at], text, ended=False) == Difference(missing=len(text) - at)


@given(st.integers(0, 199), st.integers(1, 60), st.booleans())
def test_a_piece_that_was_sent_twice_is_doubled(at, size, ended):
    text = "".join(f"{i} " for i in range(100))
    at = max(size, at)
    received = text[:at] + text[at - size : at] + text[at:]
    assert compare(received, text, ended=ended) == Difference(doubled=size)


@given(st.integers(0, 100), st.integers(1, 60))
def test_a_piece_that_was_left_out_is_missing(at, size):
    text = "".join(f"{i} " for i in range(100))
    found = compare(text[:at] + text[at + size :], text, ended=True)
    assert found == Difference(missing=size)


@pytest.mark.parametrize("ended", [True, False])
def test_other_text_is_changed_from_where_it_parts(ended):
    assert compare("the cat sat on the mat", "the cat ran to the hills", ended=ended).changed == len("sat on the mat")


def test_a_text_that_goes_on_too_long_is_changed():
    assert compare("to be or not to be", "to be", ended=True) == Difference(changed=len(" or not to be"))
