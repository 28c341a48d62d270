"""Chat templates of published models write what `transformers` writes, and cannot leave their sandbox."""

import datetime
import functools
import json
from pathlib import Path

import pytest

from serving.errors import InvalidRequest, StartError
from serving.text.chat_template import ChatTemplate
from serving.text.tokenizer_formats import TOKENIZER_CONFIG, TokenizerSettings
from tests.support.published_assets import vocabularies

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "Größe"}}}
TURNS = (
    [{"role": "user", "content": "What is 1 + 1?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": 'Say "<hi>" & leave.'},
        {"role": "assistant", "content": "<hi>"},
        {"role": "user", "content": "数学 🎉"},
    ],
    [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "2"},
    ],
)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <two> things.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "A"}, "b": {"type": "string", "description": "B"}},
            "required": ["a", "b"],
        },
    },
}
OF_SERVED_FAMILIES = (
    *("DeepSeek-V3.1", "GLM-4.6", "Kimi-K2-Instruct", "gpt-oss-120b", "granite-3.3", "Phi-3.5-mini"),
    *("Qwen3-0.6B", "Mistral-Nemo-Instruct", "meta-llama-Llama-3.1-8B"),
)


def template(text: str) -> ChatTemplate:
    return ChatTemplate({"default": text}, NAMES)


@functools.cache
def published() -> list[Path]:
    return sorted((vocabularies() / "templates").glob("*.jinja"))


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
@pytest.mark.parametrize("turns", TURNS, ids=["one", "several", "called"])
def test_published_templates_write_what_transformers_writes(turns, tools):
    utilities = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs moejax[parity]")
    compared = 0
    for path in published():
        ours, theirs = template(path.read_text()), utilities._compile_jinja_template(path.read_text())
        given = {"messages": turns, "tools": tools, "documents": None, "add_generation_prompt": True, **NAMES}
        try:
            expected = theirs.render(**given)
        except Exception:
            with pytest.raises(InvalidRequest):
                ours.render(turns, tools=tools)
        else:
            assert ours.render(turns, tools=tools) == expected, path.name
            compared += 1
    assert compared > 20, "most templates can write most conversations"


@pytest.mark.parametrize("family", OF_SERVED_FAMILIES)
def test_templates_of_served_families_write_a_conversation(family):
    (path,) = (p for p in published() if family in p.name)
    text = template(path.read_text()).render(TURNS[1])
    assert "数学 🎉" in text
    assert "Be brief." in text


def test_today_is_what_the_template_asks_for():
    text = template("{{ strftime_now('%Y-%m-%d') }}").render([])
    assert abs((datetime.date.fromisoformat(text) - datetime.date.today()).days) <= 1


def test_json_is_not_escaped_for_html_and_takes_what_transformers_takes():
    value = [{"role": "user", "content": {"b": "<é>", "a": 1}}]
    text = template("{{ messages[0].content|tojson }}").render(value)
    assert text == '{"b": "<é>", "a": 1}'
    form = "{{ messages[0].content|tojson(ensure_ascii=true, indent=1, separators=(',', ':'), sort_keys=true) }}"
    assert template(form).render(value) == '{\n "a":1,\n "b":"<\\u00e9>"\n}'


def test_marks_for_training_are_plain_text():
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert template(text).render(TURNS[1]) == "Be brief." + 'Say "<hi>" & leave.' + "<hi>" + "数学 🎉"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[9].content.x }}", "no element 9"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
    ],
)
def test_what_a_template_must_not_do_is_refused(text, says):
    with pytest.raises(InvalidRequest, match=says):
        template(text).render(TURNS[0])


def test_a_template_for_tools_is_used_for_tools(tmp_path):
    listed = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (tmp_path / TOKENIZER_CONFIG).write_text(json.dumps({"chat_template": listed}))
    loaded = ChatTemplate.load(tmp_path, TokenizerSettings.load(tmp_path), NAMES)
    assert loaded.render(TURNS[0]) == "plain"
    assert loaded.render(TURNS[0], tools=[TOOL]) == "with tools"


def test_the_file_goes_before_the_settings_and_names_come_from_them(tmp_path):
    settings = {"chat_template": "settings {{ bos_token }}", "bos_token": {"content": "<b>"}}
    (tmp_path / TOKENIZER_CONFIG).write_text(json.dumps(settings))
    read = TokenizerSettings.load(tmp_path)
    assert ChatTemplate.load(tmp_path, read, read.special_tokens).render([]) == "settings <b>"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert ChatTemplate.load(tmp_path, read, read.special_tokens).render([]) == "file <b>"
    (tmp_path / "chat_template.jinja").write_text("")
    assert ChatTemplate.load(tmp_path, read, read.special_tokens) is None


def test_a_broken_template_is_named_with_its_line(tmp_path):
    (tmp_path / TOKENIZER_CONFIG).write_text(json.dumps({"chat_template": "\n\n{% if %}"}))
    with pytest.raises(StartError, match=r"tokenizer_config\.json, line 3"):
        ChatTemplate.load(tmp_path, TokenizerSettings.load(tmp_path), {})
