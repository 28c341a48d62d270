"""Messages as other programs send them, and what a chat template gets."""

import pytest

from serving.api.http.bodies.chat import ChatBody
from serving.api.http.bodies.decoding import decode_body
from serving.api.http.openai_requests import parse_completion
from serving.errors import InvalidRequest

USER = {"role": "user", "content": "hi"}


def chat(*messages, **fields):
    return parse_completion({"messages": list(messages), **fields}, chat=True, models=["m"])


def turns(*messages, **fields):
    return chat(*messages, **fields).prompts[0].messages


def test_what_other_servers_put_into_a_history_is_taken():
    history = {
        "role": "assistant",
        "content": "x",
        "annotations": [],
        "refusal": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "reasoning_content": "y",
    }
    answer = {"role": "assistant", "content": "x", "reasoning_content": "y", "thinking": "y"}
    assert turns(USER, history) == (USER, answer)
    assert chat(USER, history).ignored == ()
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "annotations": None}]
    marked = chat({"role": "user", "content": parts}, {"role": "assistant", "content": "b", "annotations": [1]})
    assert marked.ignored == ("messages[0].content[0].cache_control", "messages[1].annotations")


def test_parts_of_every_kind_of_text_are_text_and_others_are_refused_by_their_path():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "output_text", "text": "b"},
        {"type": "refusal", "refusal": "c"},
    ]
    assert turns({"role": "assistant", "content": [*parts, "d", {"text": "e"}]})[0]["content"] == "abcde"
    for part, path in (
        ({"type": "image_url", "image_url": {"url": "x"}}, "messages[0].content[0]"),
        ({"type": "text"}, "messages[0].content[0].text"),
        ({"image_url": {"url": "x"}}, "messages[0].content[0].text"),
        (None, "messages[0].content[0]"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            chat({"role": "user", "content": [part]})
        assert caught.value.param == path


def test_parts_that_think_are_the_reasoning_of_a_turn():
    for thinking in ("hm", [{"type": "text", "text": "h"}, {"type": "text", "text": "m"}]):
        parts = [{"type": "thinking", "thinking": thinking, "closed": True}, {"type": "text", "text": "x"}]
        made = turns(USER, {"role": "assistant", "content": parts})[1]
        assert (made["content"], made["reasoning_content"]) == ("x", "hm")


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": [{"type": "thinking", "thinking": "hm"}]}, "the type 'thinking'"),
        ({"role": "assistant", "content": [{"type": "thinking", "text": "hm"}]}, "thinking is missing"),
        (
            {"role": "assistant", "reasoning_content": "a", "content": [{"type": "thinking", "thinking": "b"}]},
            "reasoning twice",
        ),
    ],
)
def test_reasoning_that_would_be_lost_is_refused(message, text):
    with pytest.raises(InvalidRequest, match=text) as caught:
        turns(USER, message)
    assert caught.value.param.startswith("messages[1].content[0]")


def test_calls_with_nulls_and_arguments_of_either_form_reach_the_template_as_values():
    call = {"id": "c", "type": None, "index": 0, "function": {"name": "f", "arguments": '{"x": null}', "more": None}}
    other = {"function": {"name": "f", "arguments": {"y": 1}}}
    made = turns(USER, {"role": "assistant", "content": None, "tool_calls": [call, other]})[1]
    assert made["tool_calls"] == [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": None}}},
        {"type": "function", "function": {"name": "f", "arguments": {"y": 1}}},
    ]
    assert made["content"] is None
    assert turns(USER, {"role": "assistant", "content": None})[1]["content"] == ""
    with pytest.raises(InvalidRequest, match="content is missing"):
        turns({"role": "user", "content": None})


def test_the_effort_of_reasoning_is_a_variable_of_the_template_and_kwargs_win():
    assert chat(USER, reasoning_effort="low").prompts[0].variables == {"reasoning_effort": "low"}
    kwargs = {"reasoning_effort": "high", "enable_thinking": False}
    both = chat(USER, reasoning_effort="low", chat_template_kwargs=kwargs, verbosity="low")
    assert (both.prompts[0].variables, both.ignored) == (kwargs, ("verbosity",))


def test_tools_reach_the_template_as_they_were_sent_without_nulls_and_marks():
    tool = {
        "type": "function",
        "cache_control": {"type": "ephemeral"},
        "function": {"name": "f", "description": None, "parameters": {"type": "object", "default": None}},
    }
    made = chat(USER, tools=[tool])
    assert made.prompts[0].tools == (
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "default": None}}},
    )
    assert made.ignored == ("tools[0].cache_control",)
    for without_type in ({"function": {"name": "f"}}, {"type": None, "function": {"name": "f"}}):
        assert chat(USER, tools=[without_type]).prompts[0].tools == ({"type": "function", "function": {"name": "f"}},)
    for other in ({"type": "custom", "function": {"name": "f"}}, {"type": "function", "name": "f"}):
        with pytest.raises(InvalidRequest):
            chat(USER, tools=[other])
    assert decode_body({"messages": [USER], "tools": [tool]}, ChatBody)[0].tools is not None
