"""Reasoning at the beginning of an answer is split off, whatever pieces the answer comes in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.text.answer_parts import Reasoning
from serving.text.reasoning import REASONING_FORMATS, ReasoningParser

THINK = REASONING_FORMATS["think"]


def split(*pieces: str, inside: bool = False) -> tuple[str, str]:
    """The reasoning and the text of an answer."""
    parser = ReasoningParser(THINK, inside=inside)
    found = [*(part for piece in pieces for part in parser.push(piece)), *parser.flush()]
    return (
        "".join(part.text for part in found if isinstance(part, Reasoning)),
        "".join(part for part in found if isinstance(part, str)),
    )


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\na b\n</think>\n\nyes", False, ("a b", "yes")),
        ("\n<think></think>yes", False, ("", "yes")),
        ("a b\n</think>\n\nyes\n", True, ("a b", "yes\n")),
        ("never ends </thi", True, ("never ends </thi", "")),
        ("<think>never ends", False, ("never ends", "")),
        (" yes <think>no</think>", False, ("", " yes <think>no</think>")),
        ("<thi", False, ("", "<thi")),
        ("", True, ("", "")),
    ],
)
def test_reasoning_and_text_are_told_apart(text, inside, expected):
    assert split(text, inside=inside) == expected
    assert split(*text, inside=inside) == expected


@given(
    st.lists(st.sampled_from(["word", " ", "\n", "<", "<think>", "</think>", "é"]), max_size=8),
    st.lists(st.integers(0, 60), max_size=8),
    st.booleans(),
)
def test_the_result_does_not_depend_on_how_the_text_is_cut(parts, cuts, inside):
    text = "".join(parts)
    cuts = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(*pieces, inside=inside) == split(text, inside=inside)


def test_a_prompt_that_ends_with_the_mark_has_begun_the_reasoning():
    assert THINK.starts_inside("<|assistant|>\n<think>\n")
    assert not THINK.starts_inside("<think>\n\n</think>\n\n")
    assert not THINK.starts_inside("")
