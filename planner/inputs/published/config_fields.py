"""The fields of a published config.json, read with their types; errors name the field that is missing or wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from planner.errors import InputError

_REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True)
class ConfigFields:
    """The `values` of a configuration found at `where`.

    As in `transformers`, a field that is absent takes the default of its class, and one that is null means "none": the
    two differ for some fields (`default` and `null` of the methods below). All methods raise InputError.
    """

    values: Mapping[str, Any]
    where: str

    def has(self, key: str) -> bool:
        """True if the field is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: Any = _REQUIRED, *, null: Any = _REQUIRED, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value, is_given = self._get(key, default, null)
        if is_given and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise self.error(f"{key} is {value!r}; it must be a whole number of at least {least}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number."""
        value, is_given = self._get(key, default)
        if not is_given:
            return value
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.error(f"{key} is {value!r}; it must be a number")
        return float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        value, is_given = self._get(key, default)
        if is_given and not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}; it must be true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value, is_given = self._get(key, default)
        if is_given and not isinstance(value, str):
            raise self.error(f"{key} is {value!r}; it must be a string")
        return value

    def listed(self, key: str, kind: type, default: Any = _REQUIRED) -> tuple:
        """A list of values of one kind (numbers: float)."""
        value, is_given = self._get(key, default)
        if not is_given:
            return value
        wanted = (int, float) if kind is float else kind
        if not isinstance(value, list | tuple) or any(isinstance(v, bool) or not isinstance(v, wanted) for v in value):
            raise self.error(f"{key} is {value!r}; it must be a list of {kind.__name__}")
        return tuple(kind(v) for v in value)

    def nested(self, key: str) -> ConfigFields | None:
        """The fields of an object within, or None."""
        if not self.has(key):
            return None
        if not isinstance(self.values[key], Mapping):
            raise self.error(f"{key} is {self.values[key]!r}; it must be an object")
        return ConfigFields(self.values[key], f"{self.where}, {key}")

    def error(self, what: str) -> InputError:
        """An error that names the file or object that these fields are in."""
        return InputError(f"{self.where}: {what}.")

    def _get(self, key: str, default: Any, null: Any = _REQUIRED) -> tuple[Any, bool]:
        """The field's value, and whether the configuration gives it."""
        if self.has(key):
            return self.values[key], True
        if key in self.values and null is not _REQUIRED:
            return null, False
        if default is _REQUIRED:
            raise self.error(f"{key} is missing")
        return default, False
