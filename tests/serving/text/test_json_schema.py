"""Schemas of callers: a keyword that permits everything changes nothing, and no other keyword is left out."""

import json

import pytest

from serving.errors import InvalidRequest
from serving.protocol.sampling import StructuredOutputs
from serving.text.json_schema import without_neutral_keywords
from serving.text.structured_output import GrammarMatcher
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.fake_backend import MODEL

PLAIN = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NEUTRAL = [
    *({key: None} for key in ("enum", "pattern", "additionalProperties", "anyOf", "$ref", "description", "format")),
    *({key: False} for key in ("uniqueItems", "not")),
    *({key: True} for key in ("propertyNames", "unevaluatedProperties", "unevaluatedItems", "if", "then")),
    *({key: {}} for key in ("dependentRequired", "dependentSchemas", "propertyNames", "else")),
    {"minContains": 2, "format": "colour"},
]


@pytest.fixture(scope="module")
def matcher() -> GrammarMatcher:
    return GrammarMatcher(byte_tokenizer(), MODEL.vocab_size, MODEL.stop_tokens)


@pytest.mark.parametrize("more", NEUTRAL, ids=str)
def test_a_keyword_that_permits_everything_changes_nothing_at_any_depth(more):
    written = more | PLAIN | {"properties": {"a": more | {"type": "integer"}}}
    assert without_neutral_keywords(written) == PLAIN
    assert without_neutral_keywords({"anyOf": [written]}) == {"anyOf": [PLAIN]}


def test_a_type_that_is_null_is_not_taken_for_any_type():
    assert without_neutral_keywords({"type": None}) == {"type": None}


def test_values_that_look_like_schemas_stay_as_they_are():
    schema = {"const": None, "enum": [None, {"not": False}], "default": {"format": None}, "properties": {"not": PLAIN}}
    assert without_neutral_keywords(schema) == schema


def test_unevaluated_properties_are_additional_ones_where_nothing_else_evaluates_any(matcher):
    closed = PLAIN | {"unevaluatedProperties": False}
    assert without_neutral_keywords(closed) == PLAIN | {"additionalProperties": False}
    beside = closed | {"allOf": [{"properties": {"b": {}}}]}
    assert without_neutral_keywords(beside) == beside


@pytest.mark.parametrize(
    "more", [{"uniqueItems": True}, {"not": {"const": 2}}, {"contains": {"const": 1}, "minContains": 1}], ids=str
)
def test_a_keyword_that_cannot_be_enforced_is_refused_by_name_also_of_a_tool(matcher, more):
    tools = [{"function": {"name": "f", "parameters": {"properties": {"a": more}}}, "position": 0}]
    guides = [StructuredOutputs("json", json.dumps(schema)) for schema in (more, {"items": more})]
    for guide in (*guides, StructuredOutputs("tools", json.dumps(tools))):
        with pytest.raises(InvalidRequest, match=rf'schema has .*"{next(iter(more))}".*, which cannot be enforced'):
            matcher.check(guide)
