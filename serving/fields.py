"""The fields of a JSON object, each with the type that is wanted."""

import difflib
import types
from collections.abc import Mapping
from typing import Any

from serving.errors import InvalidRequest


class Fields:
    """A JSON object's fields with the type that is wanted, or InvalidRequest."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def refuse_unknown(
        self,
        known: frozenset[str],
        ignored: frozenset[str] = frozenset(),
        neutral: Mapping[str, tuple[Any, ...]] = types.MappingProxyType({}),
    ) -> None:
        """Raises InvalidRequest on a field in none of the three, and on a neutral one that asks for something."""
        for name, value in self.values.items():
            if name in known or name in ignored:
                continue
            if name not in neutral:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise InvalidRequest(f"unknown field {name!r}.{hint}", param=name)
            if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral[name]):
                raise InvalidRequest(f"{name} is not supported by this server. Leave it out.", param=name)

    def text(self, name: str, default: str) -> str:
        return self._typed(name, default, str, "text")

    def flag(self, name: str) -> bool:
        return self._typed(name, False, bool, "true or false")

    def integer(self, name: str, default: Any) -> Any:
        return self._typed(name, default, int, "an integer")

    def number(self, name: str, default: float) -> float:
        value = self._typed(name, default, (int, float), "a number")
        try:
            return float(value)
        except OverflowError:
            raise InvalidRequest(f"{name} has {len(str(value))} digits, which is too large.", param=name) from None

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name, [])
        return self._list(name, [value] if isinstance(value, str) else value, str, "text or a list of texts")

    def integers(self, name: str) -> tuple[int, ...]:
        return self._list(name, self.values.get(name, []), int, "a list of integers")

    def mapping(self, name: str) -> dict[str, Any]:
        return self._typed(name, {}, dict, "an object")

    def _typed(self, name: str, default: Any, kind: Any, wanted: str) -> Any:
        value = self.values.get(name, default)
        if value is not default and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise InvalidRequest(f"{name} is {described(value)}; it must be {wanted}.", param=name)
        return value

    def _list(self, name: str, value: Any, kind: type, wanted: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or not all(type(v) is kind for v in value):
            raise InvalidRequest(f"{name} is {described(value)}; it must be {wanted}.", param=name)
        return tuple(value)


def described(value: Any) -> str:
    """A value's JSON type, and the value when it is short enough to help."""
    if value is None:
        return "missing"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    text = repr(value)
    return names[type(value)] + (f" ({text})" if len(text) <= 40 else "")
