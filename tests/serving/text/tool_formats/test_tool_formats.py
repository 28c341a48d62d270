"""Calls in the format of each family: found whole whatever pieces they come in, and never reported wrongly."""

import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.protocol.request import AnswerParsing
from serving.text.answer_parts import CUT, InvalidToolCall, Reasoning, ToolCall
from serving.text.chat_format import REASONING_ALIASES, TOOL_ALIASES, ChatFormat
from serving.text.tool_formats import TOOL_FORMATS, tool_format_of
from tests.support.published_assets import vocabularies

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = (
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
)
WEATHER, NOW = {"city": 'Köln "am" Rhein', "days": 2}, {}
WEATHER_JSON = json.dumps(WEATHER, ensure_ascii=False)
TWO_CALLS = {
    "hermes": (
        f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER_JSON}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    ),
    "qwen3_coder": (
        '<tool_call>\n<function=weather>\n<parameter=city>\nKöln "am" Rhein\n</parameter>\n<parameter=days>\n2\n'
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>"
    ),
    "glm4_moe": (
        '<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln "am" Rhein</arg_value>\n<arg_key>days</arg_key>\n'
        "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>"
    ),
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{WEATHER_JSON}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "deepseek_v31": (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{WEATHER_JSON}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        f"{WEATHER_JSON}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}"
        "<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "mistral": f"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{WEATHER_JSON}[TOOL_CALLS]now[ARGS]{{}}",
    "granite": (
        f'<|tool_call|>[{{"name": "weather", "arguments": {WEATHER_JSON}}}, {{"name": "now", "arguments": {{}}}}]'
    ),
    "llama3_json": f'{{"name": "weather", "parameters": {WEATHER_JSON}}}; {{"name": "now", "parameters": {{}}}}',
    "llama4_pythonic": "[weather(city='Köln \"am\" Rhein', days=2), now()]",
    "harmony": (
        f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{WEATHER_JSON}<|call|>"
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>"
    ),
}
"""A call of `weather` and one of `now`, as the models of each format write them."""
OLDER = f'[TOOL_CALLS][{{"name": "weather", "arguments": {WEATHER_JSON}}}, {{"name": "now", "arguments": {{}}}}]'


def parts(name: str, *pieces: str, cut: bool = False, **parsing) -> list:
    """The parts that come of the pieces of an answer, neighbouring texts joined."""
    parser = ChatFormat(TOOL_FORMATS[name]).parser(AnswerParsing(**{"tools": TOOLS, **parsing}))
    found: list = []
    for part in [*(part for piece in pieces for part in parser.push(piece)), *parser.flush(cut)]:
        if found and isinstance(part, str) and isinstance(found[-1], str):
            found[-1] += part
        elif found and isinstance(part, Reasoning) and isinstance(found[-1], Reasoning):
            found[-1] = Reasoning(found[-1].text + part.text)
        else:
            found.append(part)
    return found


def called(found: list) -> list:
    return [(call.name, json.loads(call.arguments)) for call in found]


def test_every_format_has_an_example():
    assert set(TWO_CALLS) == set(TOOL_FORMATS)
    assert set(TOOL_ALIASES.values()) <= set(TOOL_FORMATS)
    for name in (*TOOL_ALIASES, *REASONING_ALIASES):
        ChatFormat.of("", tool_parser=name if name in TOOL_ALIASES else "auto")


@pytest.mark.parametrize(("name", "text"), [*TWO_CALLS.items(), ("mistral", OLDER)])
def test_the_calls_of_an_answer_are_found_and_no_text_beside_them(name, text):
    assert called(parts(name, text)) == [("weather", WEATHER), ("now", NOW)]
    assert called(parts(name, text, parallel=False)) == [("weather", WEATHER)]
    assert called(parts(name, text, cut=True)) == [("weather", WEATHER), ("now", NOW)]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_without_tools_an_answer_has_no_calls(name):
    assert not any(isinstance(part, ToolCall) for part in parts(name, TWO_CALLS[name], tools=()))


@pytest.mark.parametrize("name", sorted(set(TOOL_FORMATS) - {"llama3_json", "llama4_pythonic", "harmony"}))
def test_text_before_a_call_is_kept_without_the_space_between(name):
    first, *calls = parts(name, "I look it up.\n\n" + TWO_CALLS[name])
    assert first == "I look it up."
    assert called(calls) == [("weather", WEATHER), ("now", NOW)]


@pytest.mark.parametrize("name", TOOL_FORMATS)
@given(data=st.data())
def test_a_cut_call_is_never_text_nor_a_call_with_broken_arguments(name, data):
    text = TWO_CALLS[name]
    found = parts(name, text[: data.draw(st.integers(1, len(text)))], cut=True)
    for part in found:
        if isinstance(part, ToolCall):
            assert isinstance(json.loads(part.arguments), dict)
        elif isinstance(part, str):  # the beginning of a mark alone
            assert len(part) < 30
            assert part.strip() in text
    complete = [part for part in found if isinstance(part, ToolCall)]
    assert called(complete) == [("weather", WEATHER), ("now", NOW)][: len(complete)]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_an_answer_cut_in_the_middle_of_its_call_says_so(name):
    text = TWO_CALLS[name]
    middle = text[: text.index("Köln") + 2]
    (call,) = parts(name, middle, cut=True)
    assert isinstance(call, InvalidToolCall)
    assert call.error == CUT


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_arguments_that_are_no_json_make_no_call(name, number):
    text = TWO_CALLS[name].replace("days=2", f"days={number}").replace('"days": 2', f'"days": {number}')
    for part in parts(name, text):
        if isinstance(part, ToolCall):
            json.loads(part.arguments, parse_constant=lambda constant: pytest.fail(constant))


@pytest.mark.parametrize("name", TOOL_FORMATS)
@given(data=st.data())
def test_the_parts_do_not_depend_on_how_the_text_is_cut(name, data):
    marks = TOOL_FORMATS[name].marks
    some = st.sampled_from(
        ["word", " ", "\n", "<", "{", '"', "[", *marks, TWO_CALLS[name], "é", "to=", '{"name": "now"}']
    )
    text = "".join(data.draw(st.lists(some, max_size=8)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    cut = data.draw(st.booleans())
    assert parts(name, *pieces, cut=cut) == parts(name, text, cut=cut) == parts(name, *text, cut=cut)


def test_an_end_mark_within_a_string_ends_nothing():
    text = '<tool_call>{"name": "weather", "arguments": {"city": "a</tool_call>b"}}</tool_call> done'
    assert called(parts("hermes", text)[:1]) == [("weather", {"city": "a</tool_call>b"})]
    broken = '<tool_call>{"name": "say "hi}</tool_call> and <tool_call>{"name": "now"}</tool_call>'
    invalid, text, call = parts("hermes", broken)
    assert isinstance(invalid, InvalidToolCall)
    assert (text, call.name) == (" and", "now")


def test_messages_of_gpt_oss_are_told_apart():
    text = (
        "<|channel|>analysis<|message|>think <|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It rains.<|return|>"
    )
    assert parts("harmony", text) == [Reasoning("think "), "I look.It rains."]
    assert parts("harmony", '{"plain": 1}') == ['{"plain": 1}']


def test_a_call_of_kimi_keeps_the_id_that_the_model_gave_it():
    assert [call.id for call in parts("kimi_k2", TWO_CALLS["kimi_k2"])] == ["functions.weather:0", "functions.now:1"]


@functools.cache
def published() -> dict[str, str]:
    return {path.stem: path.read_text("utf-8") for path in (vocabularies() / "templates").glob("*.jinja")}


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("deepseek-ai-DeepSeek-V3.1", "deepseek_v31", "think"),
        ("llama-cpp-deepseek-r1", "deepseek_v3", "think"),
        ("Kimi-K2-Instruct", "kimi_k2", None),
        ("Kimi-K2-Thinking", "kimi_k2", "think"),
        ("GLM-4.6", "glm4_moe", "think"),
        ("openai-gpt-oss-120b", "harmony", None),
        ("mistralai-Mistral-Nemo-Instruct-2407", "mistral", None),
        ("mistralai-Ministral-3-14B-Reasoning-2512", "mistral", "mistral"),
        ("ibm-granite-granite-3.3-2B-Instruct", "granite", "think"),
        ("ibm-granite-granite-4.0", "hermes", None),
        ("Qwen-Qwen3-0.6B", "hermes", "think"),
        ("Qwen3-Coder", "qwen3_coder", None),
        ("Qwen-Qwen2.5-7B-Instruct", "hermes", None),
        ("meta-llama-Llama-3.1-8B-Instruct", "llama3_json", None),
        ("meta-llama-Llama-3.2-3B-Instruct", "llama3_json", None),
    ],
)
def test_the_format_of_a_published_template_is_that_of_its_family(template, tools, reasoning):
    found = ChatFormat.of(published()[template])
    assert found.tools is not None
    assert (found.tools.name, found.reasoning and found.reasoning.name) == (tools, reasoning)
    assert tool_format_of(published()[template]).name == tools
