"""JSON schemas of callers, made ready for llguidance."""

from collections.abc import Mapping
from typing import Any

SPACING: Any = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
"""Spacing of JSON: with free spacing a weak model fills the answer with spaces. `x-guidance` in a schema overrides
it."""
_KNOWN_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
"""Formats that llguidance enforces; it refuses others, while JSON Schema says that an unknown one is ignored."""
_SINGLE = (
    *("items", "additionalItems", "unevaluatedItems", "contains", "not", "if", "then", "else"),
    *("additionalProperties", "unevaluatedProperties", "propertyNames"),
)
"""Keywords whose value is a schema."""
_LISTS = ("prefixItems", "items", "anyOf", "allOf", "oneOf")
"""Keywords whose value is a list of schemas."""
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose value has schemas by name."""


_VALUES = ("const", "default", "example", "examples")
"""Keywords whose value may be null; that of other keywords is null where a program writes what it does not set."""
_APPLICATORS = ("$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "additionalProperties")
"""Keywords beside which `unevaluatedProperties` may mean something else than `additionalProperties`."""


def with_spacing(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with our spacing where it does not choose its own, and without what says nothing."""
    return {"x-guidance": dict(SPACING), **without_neutral_keywords(schema)}


def without_neutral_keywords(schema: Any) -> Any:
    """The schema without keywords that say nothing, of which llguidance refuses many: formats that are unknown, nulls,
    and values that permit everything, as in `"uniqueItems": false`. Values that only look like a schema, such as those
    of `const`, `enum` and `default`, stay as they are."""
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if _says_nothing(key, value, schema):
            continue
        if key == "unevaluatedProperties" and not any(each in schema for each in _APPLICATORS):
            key = "additionalProperties"
        if key in _LISTS and isinstance(value, list):
            value = [without_neutral_keywords(each) for each in value]
        elif key in _MAPS and isinstance(value, Mapping):
            value = {name: without_neutral_keywords(each) for name, each in value.items()}
        elif key in _SINGLE:
            value = without_neutral_keywords(value)
        found[key] = value
    return found


def _says_nothing(key: str, value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a keyword of a schema permits every value."""
    if value is None:
        return key not in (*_VALUES, "type")  # whose null was more likely to be the type "null"
    match key:
        case "format":
            return not (isinstance(value, str) and value in _KNOWN_FORMATS)
        case "uniqueItems" | "not":
            return value is False
        case "propertyNames" | "unevaluatedProperties" | "unevaluatedItems":
            return value is True or value == {}
        case "dependentRequired" | "dependentSchemas":
            return value == {}
        case "minContains" | "maxContains":
            return "contains" not in schema
        case "then" | "else":
            return "if" not in schema
        case "if":
            return "then" not in schema and "else" not in schema
    return False
