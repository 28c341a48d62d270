"""Decodes JSON into a model, and says in a caller's words what is wrong with a field."""

import re
from typing import Any, TypeVar

import msgspec

from serving.api.http.bodies.rules import ignored_fields
from serving.errors import InvalidRequest
from serving.text.json_fields import describe_value

Model = TypeVar("Model", bound=msgspec.Struct)

_MOST_WHOLE = 32
"""Most numbers, or lists of them, of one body that are made integers; each costs another look at the body."""
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "array": "a list",
    "object": "an object",
}
"""The types of msgspec's messages, as a caller knows them."""


def decode_body(raw: Any, model: type[Model], *, strict: bool = False) -> tuple[Model, tuple[str, ...]]:
    """The body in decoded JSON, and the paths of the fields that are ignored. Whole numbers that are written with a
    fraction, as in 3.0, become integers in `raw` where integers are wanted.

    Raises InvalidRequest, with `param` the path of the field at fault.
    """
    if not isinstance(raw, dict):
        raise InvalidRequest(f"the body is {describe_value(raw)}; it must be a JSON object.")
    body = _convert(raw, model)
    return body, tuple(ignored_fields(body, raw, strict=strict))


def _convert(raw: dict[str, Any], model: type[Model]) -> Model:
    for _ in range(_MOST_WHOLE):
        try:
            return msgspec.convert(raw, model, str_keys=True)
        except msgspec.ValidationError as error:
            if not _make_whole(str(error), raw):
                raise _invalid(str(error), raw) from None
    raise InvalidRequest(f"more than {_MOST_WHOLE} integers are written with a fraction, as in 3.0. Write them as 3.")


def _make_whole(text: str, raw: Any) -> bool:
    """Whether the number that an error is about is a whole one, and is an integer now, with the others beside it; in a
    list, all of its numbers. There are languages in which every number has a fraction."""
    found = re.search(r"Expected `([^`]+)`, got `float` - at `\$\.?([^`]*)`", text)
    if found is None or "int" not in found[1].split(" | "):
        return False
    number, path = _value_at(raw, found[2]), re.sub(r"(\[\d+\])+$", "", found[2])
    outer, _, name = path.rpartition(".")
    inner = _value_at(raw, outer)
    if not isinstance(number, float) or not number.is_integer() or not isinstance(inner, dict) or name not in inner:
        return False
    inner[name] = _whole(inner[name])
    inner |= {key: int(each) for key, each in inner.items() if isinstance(each, float) and each.is_integer()}
    return True


def _whole(value: Any, deep: int = 2) -> Any:
    """The value with integers for whole numbers, also in lists and in lists of them."""
    if isinstance(value, list):
        return [_whole(each, deep - 1) for each in value] if deep else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _invalid(text: str, raw: Any) -> InvalidRequest:
    """The error that msgspec's message stands for; it ends in the path of the field, as in "- at `$.messages[0]`"."""
    said, _, at = text.rpartition(" - at ")
    said, found = (said, re.search(r"`\$\.?([^`]*)`", at)) if said else (text, None)
    path = found[1] if found else ""
    is_key = at.startswith(("`key`", "key"))
    if missing := re.search(r"missing required field `(\w+)`", said):
        where = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidRequest(f"{where} is missing.", param=where)
    value = _value_at(raw, path)
    if not (wanted := re.search(r"Expected `([^`]+)`", said)):
        return InvalidRequest(f"{path} is {describe_value(value)}: {said[:1].lower()}{said[1:]}.", param=path)
    words = [_WORDS.get(kind, kind) for kind in wanted[1].split(" | ") if kind != "null"]
    if is_key:
        return InvalidRequest(f"{path} has a name that is not {' or '.join(words)}.", param=path)
    path = path.partition("[...]")[0]
    subject = f"a value of {path}" if "[...]" in text else f"{path} is {describe_value(value)}; it"
    return InvalidRequest(f"{subject} must be {' or '.join(words)}.", param=path)


def _value_at(raw: Any, path: str) -> Any:
    """The value of a path; the innermost one that can be found when the path has unknown steps."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            raw = raw[int(index)] if index else raw[name]
        except (LookupError, TypeError, ValueError):
            break
    return raw
