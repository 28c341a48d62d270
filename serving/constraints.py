"""What an answer must look like, in the ways callers say it: OpenAI's `response_format`, and vLLM's and our fields."""

import json
from typing import Any

from serving.errors import InvalidRequest
from serving.fields import Fields, described
from serving.request import Guide

GUIDES = ("response_format", "regex", "choice", "structured_outputs")
"""Fields that constrain an answer; at most one of them."""
_OBJECT = '{"type": "object"}'


def read_guide(fields: Fields) -> Guide | None:
    """The constraint of a request, None where there is none. Raises InvalidRequest naming the field."""
    readers = {"response_format": _response_format, "regex": _regex, "choice": _choice, "structured_outputs": _outputs}
    found = [guide for name in GUIDES if name in fields.values and (guide := readers[name](fields.values[name]))]
    if len(found) > 1:
        raise InvalidRequest(f"{len(found)} constraints; send one of {', '.join(GUIDES)}.", param="response_format")
    return found[0] if found else None


def _response_format(value: Any) -> Guide | None:
    form = value.get("type") if isinstance(value, dict) else None
    if form == "text":
        return None
    if form == "json_object":
        return Guide("json", _OBJECT)
    if form == "json_schema" and isinstance(value.get("json_schema"), dict):
        schema = value["json_schema"].get("schema", {})
        if isinstance(schema, dict):
            return Guide("json", json.dumps(schema))
    raise InvalidRequest(
        'response_format must be {"type": "text"}, {"type": "json_object"} or '
        '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}.',
        param="response_format",
    )


def _regex(value: Any) -> Guide:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"regex is {described(value)}; it must be a regular expression.", param="regex")
    return Guide("regex", value)


def _choice(value: Any) -> Guide:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise InvalidRequest(f"choice is {described(value)}; it must be a list of texts.", param="choice")
    return Guide("choice", json.dumps(value))


def _outputs(value: Any) -> Guide | None:
    """vLLM's `structured_outputs`: one of json, regex, choice, grammar, json_object."""
    if not isinstance(value, dict) or len(value) != 1:
        raise InvalidRequest(
            "structured_outputs must be an object with one of json, regex, choice, grammar, json_object.",
            param="structured_outputs",
        )
    ((name, given),) = value.items()
    match name, given:
        case "json", dict():
            return Guide("json", json.dumps(given))
        case "json", str():
            return Guide("json", given)
        case "json_object", bool():
            return Guide("json", _OBJECT) if given else None
        case "regex", _:
            return _regex(given)
        case "choice", _:
            return _choice(given)
        case "grammar", str():
            return Guide("lark", given)
    raise InvalidRequest(f"structured_outputs.{name} is {described(given)}.", param="structured_outputs")
