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


def with_spacing(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with our spacing where it does not choose its own, and without formats that are unknown."""
    return {"x-guidance": dict(SPACING), **without_unknown_formats(schema)}


def without_unknown_formats(schema: Any) -> Any:
    """The schema without formats that llguidance does not know. Values that only look like a schema, such as those of
    `const`, `enum` and `default`, stay as they are."""
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "format" and not (isinstance(value, str) and value in _KNOWN_FORMATS):
            continue
        if key in _LISTS and isinstance(value, list):
            value = [without_unknown_formats(each) for each in value]
        elif key in _MAPS and isinstance(value, Mapping):
            value = {name: without_unknown_formats(each) for name, each in value.items()}
        elif key in _SINGLE:
            value = without_unknown_formats(value)
        found[key] = value
    return found
