"""Messages can be used by a template in each of the ways that published templates use them."""

import json

import pytest

from serving.errors import InvalidRequest
from serving.text.chat_template import ChatTemplate
from serving.text.messages import read_messages

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":  1}'}}
TURNS = [
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "so"},
    {"role": "tool", "tool_call_id": "c", "content": "42"},
]


def rendered(template: str, turns: list = TURNS) -> str:
    return ChatTemplate({"default": template}, {}).render(read_messages(turns))


def of_first(expression: str) -> str:
    return rendered("{{ " + expression + " }}")


def of_call(expression: str) -> str:
    return rendered("{% set arguments = messages[1].tool_calls[0].function.arguments %}{{ " + expression + " }}")


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("messages[0].content", "onetwo"),
        ("'<' + messages[0].content + '>'", "<onetwo>"),
        ("messages[0].content is string", "True"),
        ("messages[0].content | tojson", '"onetwo"'),
        ("messages[0].content.split('t')[0]", "one"),
        ("'two' in messages[0].content", "True"),
    ],
)
def test_content_is_a_text(expression, expected):
    assert of_first(expression) == expected


def test_content_has_the_parts_that_were_sent():
    through = "{% for m in messages %}{% for p in m.content or [] %}[{{ p.type }}:{{ p.text }}]{% endfor %}{% endfor %}"
    assert rendered(through) == "[text:one][text:two][text:42]"


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("arguments", '{"a":  1}'),
        ("'CALL ' + arguments + '!'", 'CALL {"a":  1}!'),
        ("'CALL ' ~ arguments", 'CALL {"a":  1}'),
        ("arguments | tojson", '{"a": 1}'),
        ("arguments | string", '{"a":  1}'),
        ("arguments.items() | list", "[('a', 1)]"),
        ("arguments is mapping", "True"),
        ("arguments is string", "False"),
    ],
)
def test_arguments_are_a_text_and_a_mapping(expression, expected):
    assert of_call(expression) == expected


@pytest.mark.parametrize("turn", [TURNS[1], {k: v for k, v in TURNS[1].items() if k != "content"}])
def test_a_turn_of_calls_has_no_content(turn):
    turns = [TURNS[0], turn]
    marked = "{% for m in messages %}{% if m.content is none %}CALLS{% else %}{{ m.content }}{% endif %}{% endfor %}"
    assert rendered(marked, turns) == "onetwoCALLS"
    assert rendered("{% for m in messages %}{{ m.role + m.content }};{% endfor %}", turns) == "useronetwo;assistant;"
    assert rendered("{% for m in messages %}{{ m.content }};{% endfor %}", turns) == "onetwo;;"


def test_reasoning_is_found_under_each_of_its_names():
    assert rendered("{{ messages[1].reasoning_content }} {{ messages[1].thinking }}") == "so so"


def test_arguments_that_a_model_wrote_wrongly_reach_the_template_as_text():
    broken = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}
    turns = [{"role": "assistant", "tool_calls": [broken]}]
    assert rendered("{{ messages[0].tool_calls[0].function.arguments }}", turns) == '{"a": '


def test_the_newer_name_of_the_system_role_and_unknown_keys():
    first, second = read_messages([{"role": "developer", "content": "x"}, {"role": "user", "content": "", "n": 1}])
    assert first["role"] == "system"
    assert second["n"] == 1


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (5, "messages"),
        ([5], "messages[0]"),
        ([{"role": 5}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": 5}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[0].tool_calls[0]"),
    ],
)
def test_what_is_no_message_is_refused_by_name(messages, param):
    with pytest.raises(InvalidRequest) as caught:
        read_messages(json.loads(json.dumps(messages)))
    assert caught.value.param == param
