"""Guides: an answer drawn under its masks is what it must be, and a mask depends on the tokens so far alone."""

import dataclasses
import json
import re

import numpy as np
import pytest

from serving.errors import InvalidRequest
from serving.protocol.request import AnswerParsing, LogitsParams
from serving.protocol.sampling import StructuredOutputs
from serving.text.answer_parts import ToolCall
from serving.text.chat_format import ChatFormat
from serving.text.structured_output import GrammarMatcher
from serving.text.tokenizer import Tokenizer
from serving.text.tool_calls import required_call
from serving.text.tool_formats import TOOL_FORMATS
from simulation.hand_model import small_request
from tests.support.fake_backend import MODEL

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": -9, "maximum": 999}, "b": {"enum": ["x", "é"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": SCHEMA}},)
GUIDES = [
    StructuredOutputs("json", json.dumps(SCHEMA)),
    StructuredOutputs("regex", "[0-9]{2}-(ab|cd)+"),
    StructuredOutputs("choice", json.dumps(["yes", 'n"o', "may\nbe"])),
    required_call(TOOLS),
]
STOP = MODEL.stop_tokens[0]


@pytest.fixture
def grammar_matcher(tokenizer) -> GrammarMatcher:
    return GrammarMatcher(tokenizer, MODEL.vocab_size, MODEL.stop_tokens)


def allowed(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def drawn(grammar_matcher: GrammarMatcher, guide: StructuredOutputs, seed: int, most: int = 400) -> list[int]:
    """Tokens drawn at random under the masks, until a stop token."""
    rng, tokens, request = np.random.default_rng(seed), [], small_request(f"r{seed}", structured_outputs=guide)
    while len(tokens) < most:
        token = int(rng.choice(allowed(grammar_matcher.mask(LogitsParams(request, tuple(tokens))))))
        if token == STOP:
            return tokens
        tokens.append(token)
    raise AssertionError("the answer does not end")


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.kind)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_drawn_under_a_guide_follows_it(grammar_matcher, tokenizer, guide, seed):
    grammar_matcher.check(guide)
    text = tokenizer.decode(drawn(grammar_matcher, guide, seed))
    if guide.kind == "regex":
        assert re.fullmatch(guide.text, text)
    elif guide.kind == "choice":
        assert text in json.loads(guide.text)
    else:
        if guide.kind == "tools":
            (call,) = tokenizer.chat_format.parser(AnswerParsing(tools=TOOLS)).push(text)
            assert isinstance(call, ToolCall)
            text = call.arguments
        value = json.loads(text)
        assert isinstance(value["a"], int)
        assert value["b"] in ("x", "é")


def test_a_mask_is_the_same_whatever_was_asked_before(grammar_matcher, tokenizer):
    request = small_request("a", structured_outputs=GUIDES[1])
    tokens = tuple(b"12-abcd")
    in_turn = [grammar_matcher.mask(LogitsParams(request, tokens[:n])).tolist() for n in range(len(tokens) + 1)]
    for n in (7, 2, 5, 0):  # out of order, as after a failure; and by one who never saw it
        assert grammar_matcher.mask(LogitsParams(request, tokens[:n])).tolist() == in_turn[n]
        fresh = GrammarMatcher(tokenizer, MODEL.vocab_size, MODEL.stop_tokens)
        assert fresh.mask(LogitsParams(request, tokens[:n])).tolist() == in_turn[n]


def test_a_mask_after_drafts_is_that_after_their_tokens_and_leaves_no_trace(grammar_matcher):
    request = small_request("drafted", structured_outputs=GUIDES[1])
    tokens = tuple(b"12-abcd")
    in_turn = [grammar_matcher.mask(LogitsParams(request, tokens[:n])).tolist() for n in range(len(tokens) + 1)]
    for certain in range(len(tokens)):
        assert grammar_matcher.mask(LogitsParams(request, tokens[:certain])).tolist() == in_turn[certain]
        for drafts in range(1, len(tokens) - certain + 1):
            params = LogitsParams(request, tokens[: certain + drafts], drafts)
            assert grammar_matcher.mask(params).tolist() == in_turn[certain + drafts]
        wrong = LogitsParams(request, (*tokens[:certain], 0, 0), 2)
        assert allowed(grammar_matcher.mask(wrong)) == []
    assert grammar_matcher.take_failures() == {}


def test_where_nothing_can_follow_only_the_end_can(grammar_matcher):
    request = small_request("a", structured_outputs=StructuredOutputs("choice", '["a"]'))
    assert allowed(grammar_matcher.mask(LogitsParams(request, (97,)))) == [STOP]
    assert allowed(grammar_matcher.mask(LogitsParams(request, (98,)))) == [STOP]  # never drawn under the mask


@pytest.mark.parametrize(
    ("guide", "param"),
    [
        (StructuredOutputs("regex", "("), "regex"),
        (StructuredOutputs("json", '{"type": "nothing"}'), "response_format"),
        (StructuredOutputs("json", "{"), "response_format"),
        (StructuredOutputs("lark", "start: missing"), "structured_outputs"),
        (StructuredOutputs("regex", "a" * 100_001), "regex"),
    ],
)
def test_what_is_no_guide_is_refused_by_name(grammar_matcher, guide, param):
    with pytest.raises(InvalidRequest) as caught:
        grammar_matcher.check(guide)
    assert caught.value.param == param


def test_a_model_that_cannot_stop_cannot_be_guided(tokenizer):
    with pytest.raises(InvalidRequest, match="no stop token"):
        GrammarMatcher(tokenizer, MODEL.vocab_size, ()).check(GUIDES[0])


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_required_call_is_read_back_in_every_format(tokenizer, name):
    inner = {"type": "object", "properties": {"z": {"const": 1}}, "required": ["z"], "additionalProperties": False}
    outer = {"type": "object", "properties": {"h": {"$ref": "#/$defs/P"}, "t": {"$ref": "#/properties/h"}}}
    schema = outer | {"$defs": {"P": inner}, "required": ["h", "t"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": 'a"b', "parameters": schema}}]
    tokenizer = Tokenizer(tokenizer.format, chat_format=ChatFormat(TOOL_FORMATS[name]))
    matcher, guide = GrammarMatcher(tokenizer, MODEL.vocab_size, MODEL.stop_tokens), required_call(tools)
    matcher.check(guide)
    parser = tokenizer.chat_format.parser(AnswerParsing(tools=tuple(tools)))
    parts = [*parser.push(tokenizer.decode(drawn(matcher, guide, 0))), *parser.flush()]
    (call,) = [part for part in parts if part]
    assert isinstance(call, ToolCall)
    assert (call.name, json.loads(call.arguments)) == ('a"b', {"h": {"z": 1}, "t": {"z": 1}})


def test_a_reference_in_a_tool_is_looked_up_in_its_parameters(grammar_matcher, tokenizer):
    node = {"v": {"const": 1}, "n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}
    schema = {"type": "object", "properties": node, "required": ["v", "n"], "additionalProperties": False}
    guide = required_call([{"type": "function", "function": {"name": "list", "parameters": schema}}])
    for seed in range(3):
        text = tokenizer.decode(drawn(grammar_matcher, guide, seed, 4000))
        assert text.count('"name"') == 1


def test_a_call_has_the_spaces_of_a_response_format(grammar_matcher):
    guide, text = required_call(TOOLS), '<tool_call>\n{"name": "add", "arguments": {"a"'
    request = small_request("a", structured_outputs=guide)
    for end in range(len(text)):
        space = {9, 10, 13, 32} & set(allowed(grammar_matcher.mask(LogitsParams(request, tuple(text[:end].encode())))))
        assert space <= {ord(text[end])}


def test_a_grammar_that_fails_is_reported_once(grammar_matcher):
    guide = StructuredOutputs("choice", '["a"]')
    grammar_matcher.mask(LogitsParams(small_request("b", structured_outputs=guide), (97,)))
    assert grammar_matcher.take_failures() == {}
    grammar_matcher.mask(LogitsParams(small_request("a", structured_outputs=guide), (98,)))
    (failed,) = grammar_matcher.take_failures().items()
    assert failed[0] == "a"
    assert failed[1].param == "choice"
    assert grammar_matcher.take_failures() == {}


def test_an_unknown_format_is_ignored_and_a_known_one_is_not(grammar_matcher, tokenizer):
    schema = {
        "type": "object",
        "properties": {"format": {"const": "x"}, "a": {"type": "string", "format": "colour", "pattern": "^b$"}},
        "required": ["format", "a"],
        "additionalProperties": False,
    }
    text = tokenizer.decode(drawn(grammar_matcher, StructuredOutputs("json", json.dumps(schema)), 0))
    assert json.loads(text) == {"format": "x", "a": "b"}
    date = {"type": "string", "format": "date"}
    text = tokenizer.decode(drawn(grammar_matcher, StructuredOutputs("json", json.dumps(date)), 0))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", json.loads(text))


@pytest.mark.parametrize("name", ["<|end|>", "<|stop|>", "a<|user|>b"])
def test_the_name_of_a_special_token_in_a_literal_is_text(grammar_matcher, tokenizer, name):
    for guide in (
        StructuredOutputs("choice", json.dumps([name])),
        StructuredOutputs("regex", re.escape(name)),
        StructuredOutputs("lark", f"start: {json.dumps(name)}"),
    ):
        grammar_matcher.check(guide)
        assert tokenizer.decode(drawn(grammar_matcher, guide, 0)) == name
    guide = StructuredOutputs("json", json.dumps({"const": name}))
    assert json.loads(tokenizer.decode(drawn(grammar_matcher, guide, 0))) == name


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.kind)
@pytest.mark.parametrize("mark", ["</think>", "<|end|>"], ids=["text", "token"])
def test_reasoning_that_the_prompt_began_comes_before_the_form(grammar_matcher, tokenizer, guide, mark):
    guide = dataclasses.replace(guide, after=mark)
    grammar_matcher.check(guide)
    tokens = tokenizer.format.encode("so <b " + mark, special=False)
    request = small_request("a", structured_outputs=guide)
    for end in range(len(tokens)):
        assert tokens[end] in allowed(grammar_matcher.mask(LogitsParams(request, tuple(tokens[:end]))))
    plain = small_request("b", structured_outputs=dataclasses.replace(guide, after=""))
    after, before = (LogitsParams(request, tuple(tokens)), LogitsParams(plain, ()))
    assert allowed(grammar_matcher.mask(after)) == allowed(grammar_matcher.mask(before))
    assert grammar_matcher.take_failures() == {}


@pytest.mark.parametrize(
    "guide",
    [
        StructuredOutputs("choice", json.dumps([f"option {i}" for i in range(2500)])),
        StructuredOutputs(
            "json", json.dumps({"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1500)}})
        ),
    ],
    ids=["choices", "properties"],
)
def test_a_large_guide_is_followed(grammar_matcher, tokenizer, guide):
    grammar_matcher.check(guide)
    request, tokens = small_request("a", structured_outputs=guide), []
    rng = np.random.default_rng(0)
    while not tokens or tokens[-1] != STOP:
        mask = allowed(grammar_matcher.mask(LogitsParams(request, tuple(tokens))))
        tokens.append(STOP if STOP in mask else int(rng.choice(mask)))
        assert grammar_matcher.take_failures() == {}
    text = tokenizer.decode(tokens)
    assert text in json.loads(guide.text) if guide.kind == "choice" else isinstance(json.loads(text), dict)


def test_a_choice_may_be_the_beginning_of_another(grammar_matcher):
    request = small_request("a", structured_outputs=StructuredOutputs("choice", '["a", "ab"]'))
    assert allowed(grammar_matcher.mask(LogitsParams(request, (97,)))) == [98, STOP]
    assert allowed(grammar_matcher.mask(LogitsParams(request, (97, 98)))) == [STOP]
