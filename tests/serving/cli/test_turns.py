"""Turns of a conversation on a terminal: text that comes in pieces is wrapped between words, and nothing is lost."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from serving.cli.turns import WrappedText

INDENT = "      "
TEXT = st.text(st.sampled_from("ab \n"), max_size=80)


def shown(pieces: list[str], width: int) -> str:
    lines = WrappedText(width, INDENT)
    return "".join([*map(lines.push, pieces), lines.flush()])


@given(TEXT, st.integers(1, 12), st.lists(st.integers(0, 80), max_size=8))
def test_words_stay_whole_in_their_order_and_lines_are_as_long_as_they_may_be(text, width, cuts):
    at = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    output = shown([text[a:b] for a, b in itertools.pairwise(at)], width)
    assert output == shown([text], width)  # however it was cut
    assert output.split() == text.split()
    first, *others = output.split("\n")
    assert all(line.startswith(INDENT) for line in others)
    for line in (first, *(line.removeprefix(INDENT) for line in others)):
        assert len(line) <= width or " " not in line.strip()


def test_the_line_breaks_of_the_text_are_kept():
    assert shown(["one\n\ntwo th", "ree"], 40) == f"one\n{INDENT}\n{INDENT}two three"
