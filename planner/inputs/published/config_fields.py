"""The fields of a published config.json, read with their types; what is missing or contradicts is named."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.config import ConfigError

_REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True)
class Fields:
    """`values` of the configuration found at `where`. A field that is null counts as missing. `context` is the one to
    serve if it is shorter than the published one."""

    values: Mapping[str, Any]
    where: str
    context: int | None = None

    def has(self, key: str) -> bool:
        """True if the field is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: Any = _REQUIRED, *, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self._get(key, default)
        if value is not default and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise self.error(f"{key} is {value!r}; it must be a whole number of at least {least}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A number."""
        value = self._get(key, default)
        if value is default:
            return value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(f"{key} is {value!r}; it must be a number")
        return float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        value = self._get(key, default)
        if value is not default and not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}; it must be true or false")
        return value

    def listed(self, key: str, kind: type, default: Any = _REQUIRED) -> tuple:
        """A list of values of one kind (numbers: float)."""
        value = self._get(key, default)
        if value is default:
            return value
        wanted = (int, float) if kind is float else kind
        if not isinstance(value, list | tuple) or not all(isinstance(v, wanted) for v in value):
            raise self.error(f"{key} is {value!r}; it must be a list of {kind.__name__}")
        return tuple(kind(v) for v in value)

    def nested(self, key: str) -> "Fields | None":
        """The fields of an object within, or None."""
        if not self.has(key):
            return None
        if not isinstance(self.values[key], Mapping):
            raise self.error(f"{key} is {self.values[key]!r}; it must be an object")
        return Fields(self.values[key], f"{self.where}, {key}")

    def only(self, **known: Any) -> None:
        """Raise unless each of these fields is missing or has the one value that is served."""
        for key, value in known.items():
            if self.has(key) and self.values[key] != value:
                raise self.error(f"{key} is {self.values[key]!r}; only {value!r} is served")

    def error(self, what: str) -> ConfigError:
        """An error that says where it was."""
        return ConfigError(f"{self.where}: {what}.")

    def _get(self, key: str, default: Any) -> Any:
        if self.has(key):
            return self.values[key]
        if default is _REQUIRED:
            raise self.error(f"{key} is missing")
        return default
