"""Tools and the choice among them are checked, and calls in a text are separated from the text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import InvalidRequest
from serving.text.answer_parts import CUT, InvalidToolCall, ToolCall
from serving.text.tool_calls import read_tool_choice, read_tools, required_call
from serving.text.tool_formats import TOOL_FORMATS
from serving.text.tool_formats.parser import ToolCallParser

CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1, "ü": [2]}}\n</tool_call>'
ADD = ToolCall("add", '{"x": 1, "ü": [2]}')
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("add", "sub")]


def found(*pieces: str, cut: bool = False) -> list:
    """The parsed pieces, neighbouring texts joined."""
    calls, items = ToolCallParser(TOOL_FORMATS["hermes"]), []
    for item in [*(item for piece in pieces for item in calls.push(piece)), *calls.flush(cut)]:
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
        ("<tool_call>cut off", ["<tool_call>cut off"]),
        ('<tool_call>{"name": "f", "arguments": "{}"}', [ToolCall("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}', [ToolCall("f", '{"x": "\\ud800"}')]),
        ('<tool_call>{"name": "f"}</tool_call>', [ToolCall("f", "{}")]),
        ("", []),
    ],
)
def test_calls_are_separated_from_text(text, expected):
    assert found(text) == expected
    assert found(*text) == expected


@pytest.mark.parametrize(
    "body",
    ["{broken", '{"name": 5}', '{"name": "f", "arguments": 5}', '{"name": "f", "arguments": "5"}', "{" * 100_000],
)
def test_a_call_that_cannot_be_carried_out_is_neither_a_call_nor_text(body):
    (invalid,) = found(f"<tool_call>{body}</tool_call>")
    assert isinstance(invalid, InvalidToolCall)
    assert invalid.text == body
    assert invalid.error != CUT


@given(st.lists(st.sampled_from(["word", " ", "<", "<tool_call>", "</tool_call>", "{", '"', CALL, "é"])), st.data())
def test_the_result_does_not_depend_on_how_the_text_is_cut(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert found(*pieces) == found(text)


def test_tool_choice_decides_the_prompt_and_the_form_of_the_answer():
    assert read_tool_choice(None, TOOLS) == read_tool_choice("auto", TOOLS) == (TOOLS, None)
    assert read_tool_choice("none", TOOLS) == ((), None)
    assert read_tool_choice("required", TOOLS) == (TOOLS, required_call(TOOLS))
    for named in ({"type": "function", "function": {"name": "sub"}}, {"type": "function", "name": "sub"}):
        assert read_tool_choice(named, TOOLS) == (TOOLS, required_call(TOOLS[1:], [1]))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_all_that_the_model_sees(mode, nested):
    some = {"mode": mode, "tools": [{"type": "function", "function": {"name": "sub"}}]}
    choice = {"type": "allowed_tools", **({"allowed_tools": some} if nested else some)}
    expected = required_call(TOOLS[1:], [1]) if mode == "required" else None
    assert read_tool_choice(choice, TOOLS) == (TOOLS[1:], expected)


@pytest.mark.parametrize(
    "wrong",
    [
        *("always", 5, {}, {"type": "custom", "name": "add"}, {"type": "function", "function": {"name": "mul"}}),
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "never", "tools": [{"name": "add"}]}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"name": "mul"}]}},
        {"type": "allowed_tools", "allowed_tools": 5},
    ],
)
def test_a_choice_that_is_none_is_refused_by_name(wrong):
    with pytest.raises(InvalidRequest, match="tool_choice") as caught:
        read_tool_choice(json.loads(json.dumps(wrong)), TOOLS)
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize("tools", [5, [5], [{"type": "function"}], [{"type": "function", "function": {"name": ""}}]])
def test_what_is_no_tool_is_refused(tools):
    with pytest.raises(InvalidRequest, match="tools"):
        read_tools(json.loads(json.dumps(tools)))
