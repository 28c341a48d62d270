"""Values of JSON in the words of a caller."""

from typing import Any

_KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
_SHOWN = 40
"""Most characters of a value that an error quotes."""


def describe_value(value: Any) -> str:
    """A value's JSON type, and the value when it is short enough to help."""
    if value is None:
        return "missing"
    text = repr(value)
    return _KINDS[type(value)] + (f" ({text})" if len(text) <= _SHOWN else "")
