"""The one rule about the fields of bodies.

1. A field that the server acts on is used.
2. A field that asks for what is done anyway, or for nothing, is accepted.
3. A field that asks for what would change the answer, and cannot be done, is refused (400, with the field's path).
4. A field that changes nothing in the answer - a label, a hint - and one that nobody knows is ignored: its path is in
   the response header `x-moejax-ignored-fields` and in the log. Under --strict-fields an unknown one is refused.

A null counts as a field that is absent. The rule of a field stands in its annotation: `Annotated[type, used(...)]`,
`accepted(...)`, `refused(...)` or `ignored(...)`.
"""

import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from serving.errors import InvalidRequest

Treatment = Literal["used", "accepted", "refused", "ignored"]
_RULE = "rule"


@dataclasses.dataclass(frozen=True)
class FieldRule:
    """The treatment of a field. `neutral` are the values that ask for nothing; `why` is the reason for what happens to
    other values, or what a used field means; `bounds` is the range of a used number."""

    treatment: Treatment
    why: str
    neutral: tuple[Any, ...] = ()
    bounds: str = ""

    def is_neutral(self, value: Any) -> bool:
        """Whether the value asks for nothing. 1 and true are different values in JSON."""
        return value is None or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.neutral)


def used(text: str, **schema: Any) -> msgspec.Meta:
    """A field that the server acts on. `schema` has further keywords of JSON Schema: they are documentation alone, and
    `serving.text.validation` is what checks ranges."""
    return _meta(FieldRule("used", text, bounds=_bounds(schema)), schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    """The range that keywords of JSON Schema give for a number, as in "0 to 100"; empty without one."""
    above, low, high = (schema.get(name) for name in ("exclusiveMinimum", "minimum", "maximum"))
    if above is not None:
        return f"above {above}" if high is None else f"above {above}, to {_plain(high)}"
    if low is not None:
        return f"from {low}" if high is None else f"{low} to {_plain(high)}"
    return ""


def _plain(number: float) -> float:
    """The number, a whole one without a fraction."""
    return int(number) if number == int(number) else number


def accepted(why: str, *neutral: Any) -> msgspec.Meta:
    """A field whose `neutral` values, documented as such, ask for what is done; other values are refused, and `why`
    says why."""
    return _meta(FieldRule("accepted", why, neutral), {"anyOf": [{"type": "null"}, *map(_only, neutral)]})


def refused(why: str) -> msgspec.Meta:
    """A field that is refused with any value."""
    return _meta(FieldRule("refused", why), {"type": "null"})


def ignored(why: str, *neutral: Any) -> msgspec.Meta:
    """A field that is ignored, with a warning unless its value is one of `neutral`."""
    return _meta(FieldRule("ignored", why, neutral), {})


def _only(value: Any) -> dict[str, Any]:
    """The schema of one value, in keywords that generators of clients understand: they know no `enum` of
    truth values, lists and objects."""
    match value:
        case list():
            return {"type": "array", "items": _only(value[0]) if value else {}, "maxItems": len(value)}
        case dict():
            return {"type": "object", "maxProperties": len(value)}
    return {"const": value}


def _meta(rule: FieldRule, schema: Mapping[str, Any]) -> msgspec.Meta:
    text = {
        "used": rule.why,
        "accepted": f"Other values are refused: {rule.why}.",
        "refused": f"Refused: {rule.why}.",
        "ignored": f"Ignored: {rule.why}.",
    }[rule.treatment]
    return msgspec.Meta(description=text, extra_json_schema=dict(schema), extra={_RULE: rule})


@functools.cache
def field_rules(model: type[msgspec.Struct]) -> Mapping[str, FieldRule]:
    """The rule of each field of a model, in the order of its definition."""
    hints = typing.get_type_hints(model, include_extras=True)
    rules: dict[str, FieldRule] = {}
    for name in model.__struct_fields__:
        extras = (e.extra or {} for e in getattr(hints[name], "__metadata__", ()) if isinstance(e, msgspec.Meta))
        rules[name] = next((extra[_RULE] for extra in extras if _RULE in extra), FieldRule("used", ""))
    return rules


def ignored_fields(body: msgspec.Struct, raw: Mapping[str, Any], *, strict: bool, path: str = "") -> Iterator[str]:
    """The paths of the fields of `raw` that are ignored. `body` was decoded from it.

    Raises InvalidRequest for a field that is refused, and with `strict` for one that is not known.
    """
    rules = field_rules(type(body))
    for name, value in raw.items():
        where = f"{path}.{name}" if path else name
        rule = rules.get(name)
        if rule is None:
            if strict:
                raise InvalidRequest(f"unknown field {where!r}.{_nearest(name, rules)}", param=where)
            if value is not None:
                yield where
        elif rule.treatment == "used":
            yield from _ignored_inside(getattr(body, name), value, where, strict)
        elif not rule.is_neutral(value):
            if rule.treatment != "ignored":
                raise InvalidRequest(_refusal(where, value, rule), param=where)
            yield where


def _ignored_inside(value: Any, raw: Any, where: str, strict: bool) -> Iterator[str]:
    if isinstance(value, msgspec.Struct) and isinstance(raw, dict):
        yield from ignored_fields(value, raw, strict=strict, path=where)
    elif isinstance(value, list) and value and isinstance(raw, list):
        for position, (each, given) in enumerate(zip(value, raw, strict=True)):
            yield from _ignored_inside(each, given, f"{where}[{position}]", strict)


def _refusal(where: str, value: Any, rule: FieldRule) -> str:
    shown = json.dumps(value)
    given = f"{where} is {shown}" if len(shown) <= 40 else where
    allowed = "".join(f" or send {json.dumps(each)}" for each in rule.neutral[:1])
    return f"{given} is not supported by this server: {rule.why}. Leave it out{allowed}."


def _nearest(name: str, rules: Mapping[str, FieldRule]) -> str:
    used_names = [known for known, rule in rules.items() if rule.treatment == "used"]
    near = difflib.get_close_matches(name, used_names, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
