"""Calls in a text: found whole whatever pieces it comes in, and what is none stays text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import InvalidRequest
from serving.tools import ToolCall, ToolCalls, calling, read_choice, read_tools

CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1, "ü": [2]}}\n</tool_call>'
ADD = ToolCall("add", '{"x": 1, "ü": [2]}')
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("add", "sub")]


def found(*pieces: str) -> list:
    """What comes of the pieces, neighbouring texts joined."""
    calls, items = ToolCalls(), []
    for item in [*(item for piece in pieces for item in calls.push(piece)), *calls.flush()]:
        if isinstance(item, str) and items and isinstance(items[-1], str):
            items[-1] += item
        else:
            items.append(item)
    return items


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no call", ["no call"]),
        (CALL, [ADD]),
        (f"I add.\n{CALL}\n{CALL}", ["I add.", ADD, ADD]),
        (f"{CALL}\n then\n", [ADD, "\n then\n"]),
        (f"{CALL}\n", [ADD]),
        ("so \n<tool_call>5", ["so \n<tool_call>5"]),
        ("a < b <tool", ["a < b <tool"]),
        ("<tool_call>{broken</tool_call>", ["<tool_call>{broken</tool_call>"]),
        ('<tool_call>{"name": 5}</tool_call>', ['<tool_call>{"name": 5}</tool_call>']),
        ('<tool_call>{"name": "f", "arguments": "{}"}', [ToolCall("f", "{}")]),
        ("<tool_call>cut off", ["<tool_call>cut off"]),
        ("", []),
    ],
)
def test_calls_and_text_are_told_apart(text, expected):
    assert found(text) == expected
    assert found(*text) == expected


@given(st.lists(st.sampled_from(["word", " ", "<", "<tool_call>", "</tool_call>", "{", CALL, "é"])), st.data())
def test_the_result_does_not_depend_on_how_the_text_is_cut(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert found(*pieces) == found(text)


def test_a_choice_decides_what_the_model_is_told_and_what_it_must_answer():
    assert read_choice(None, TOOLS) == read_choice("auto", TOOLS) == (TOOLS, None)
    assert read_choice("none", TOOLS) == ((), None)
    assert read_choice("required", TOOLS) == (TOOLS, calling(TOOLS))
    named = {"type": "function", "function": {"name": "sub"}}
    assert read_choice(named, TOOLS) == (TOOLS, calling(TOOLS[1:]))
    for wrong in ("always", {"type": "function", "function": {"name": "mul"}}, 5):
        with pytest.raises(InvalidRequest, match="tool_choice"):
            read_choice(wrong, TOOLS)


@pytest.mark.parametrize("tools", [5, [5], [{"type": "function"}], [{"type": "function", "function": {"name": ""}}]])
def test_what_is_no_tool_is_refused(tools):
    with pytest.raises(InvalidRequest, match="tools"):
        read_tools(json.loads(json.dumps(tools)))
