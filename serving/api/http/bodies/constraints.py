"""The form that an answer must have: OpenAI's `response_format`, and the fields of vLLM, SGLang and this server."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec

from serving.api.http.bodies.rules import accepted, ignored, used
from serving.errors import InvalidRequest
from serving.protocol.sampling import StructuredOutputs

_OBJECT = '{"type": "object"}'


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """The schema of a `response_format`."""

    name: Annotated[str | None, used("A name for the schema; nothing depends on it.")] = None
    description: Annotated[str | None, used("What the schema is for; nothing depends on it.")] = None
    schema: Annotated[dict[str, Any] | None, used("The JSON Schema; without it any JSON.")] = None
    strict: Annotated[bool | None, used("The schema holds for every answer, strict or not.")] = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """OpenAI's `response_format`."""

    type: Annotated[str, used("`text`, `json_object` or `json_schema`.")]
    json_schema: Annotated[JsonSchemaFormat | None, used("The schema, for the type `json_schema`.")] = None
    schema: Annotated[
        dict[str, Any] | None, used("The schema where llama.cpp has it, for `json_object` and `json_schema`.")
    ] = None

    def structured_outputs(self) -> StructuredOutputs | None:
        """The constraint, None for text. Raises InvalidRequest."""
        if self.type == "text":
            return None
        if self.schema is not None and self.json_schema is None and self.type in ("json_object", "json_schema"):
            return StructuredOutputs("json", json.dumps(self.schema))
        if self.type == "json_object":
            return StructuredOutputs("json", _OBJECT)
        if self.type == "json_schema" and self.json_schema is not None:
            return StructuredOutputs("json", json.dumps(self.json_schema.schema or {}))
        raise InvalidRequest(
            'response_format must be {"type": "text"}, {"type": "json_object"} or '
            '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}.',
            param="response_format",
        )


class StructuredOutputsBody(msgspec.Struct, kw_only=True):
    """vLLM's `structured_outputs`: one of json, regex, choice, grammar, json_object."""

    json: Annotated[dict[str, Any] | str | None, used("A JSON Schema, as an object or as text.")] = None
    json_object: Annotated[bool | None, used("Any JSON object.")] = None
    regex: Annotated[str | None, used("A regular expression.")] = None
    choice: Annotated[list[str] | None, used("One of these texts.")] = None
    grammar: Annotated[str | None, used("A grammar in Lark.")] = None
    structural_tag: Annotated[Any, accepted("tags are not understood; send a grammar")] = None
    disable_fallback: Annotated[Any, ignored("there is one implementation")] = None
    disable_any_whitespace: Annotated[Any, ignored("white space is limited in every constraint", False)] = None
    disable_additional_properties: Annotated[Any, accepted("send additionalProperties: false in the schema", False)] = (
        None
    )
    whitespace_pattern: Annotated[Any, ignored("white space is limited in every constraint")] = None


class ConstraintFields(msgspec.Struct, kw_only=True):
    """The fields that constrain an answer; at most one of them is sent."""

    response_format: Annotated[ResponseFormat | None, used("The form of the answer.")] = None
    structured_outputs: Annotated[StructuredOutputsBody | None, used("The form of the answer, as in vLLM.")] = None
    regex: Annotated[str | None, used("A regular expression that the answer matches.")] = None
    choice: Annotated[list[str] | None, used("Texts, one of which is the answer.", minItems=1)] = None
    json_schema: Annotated[str | None, used("A JSON Schema as text, as in SGLang.")] = None
    guided_json: Annotated[dict[str, Any] | str | None, used("The older name of structured_outputs.json.")] = None
    guided_regex: Annotated[str | None, used("The older name of structured_outputs.regex.")] = None
    guided_choice: Annotated[list[str] | None, used("The older name of structured_outputs.choice.")] = None
    guided_grammar: Annotated[str | None, used("The older name of structured_outputs.grammar.")] = None
    guided_decoding_backend: Annotated[Any, ignored("there is one implementation")] = None
    guided_whitespace_pattern: Annotated[Any, ignored("white space is limited in every constraint")] = None
    ebnf: Annotated[Any, accepted("grammars are written in Lark; send structured_outputs.grammar")] = None


def read_constraint(body: ConstraintFields) -> StructuredOutputs | None:
    """The constraint that a body asks for, None without one. Raises InvalidRequest naming the field."""
    found = [(name, made) for name, made in _constraints(body) if made is not None]
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise InvalidRequest(f"{len(found)} constraints ({names}); send one of them.", param=found[1][0])
    return dataclasses.replace(found[0][1], param=found[0][0]) if found else None


def _constraints(body: ConstraintFields) -> Iterator[tuple[str, StructuredOutputs | None]]:
    if body.response_format is not None:
        yield "response_format", body.response_format.structured_outputs()
    outputs = body.structured_outputs or StructuredOutputsBody()
    yield "structured_outputs.json_object", StructuredOutputs("json", _OBJECT) if outputs.json_object else None
    for name, value, read in (
        ("structured_outputs.json", outputs.json, _schema),
        ("json_schema", body.json_schema, _schema),
        ("guided_json", body.guided_json, _schema),
        ("structured_outputs.regex", outputs.regex, _regex),
        ("regex", body.regex, _regex),
        ("guided_regex", body.guided_regex, _regex),
        ("structured_outputs.choice", outputs.choice, _choice),
        ("choice", body.choice, _choice),
        ("guided_choice", body.guided_choice, _choice),
        ("structured_outputs.grammar", outputs.grammar, _grammar),
        ("guided_grammar", body.guided_grammar, _grammar),
    ):
        if value not in (None, ""):  # programs with a field for each constraint send the others empty
            yield name, read(value, name)


def _schema(value: Any, _: str) -> StructuredOutputs:
    return StructuredOutputs("json", value if isinstance(value, str) else json.dumps(value))


def _regex(value: Any, _: str) -> StructuredOutputs:
    return StructuredOutputs("regex", value)


def _choice(value: Any, name: str) -> StructuredOutputs:
    if not value or not all(value):
        raise InvalidRequest(f"{name} must be a list of texts, none of them empty.", param=name)
    return StructuredOutputs("choice", json.dumps(value))


def _grammar(value: Any, _: str) -> StructuredOutputs:
    return StructuredOutputs("lark", value)
