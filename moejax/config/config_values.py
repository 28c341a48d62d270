"""Reads a configuration from the values of a file, and the error of one that is invalid."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, cast

Config = TypeVar("Config")


class ConfigError(ValueError):
    """An invalid model configuration. The message names the field, both values and the way out."""


def build_config(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """A dataclass of configuration from the values of a file; lists become tuples. Raises ConfigError on an unknown or
    missing key."""
    known = {f.name: f for f in dataclasses.fields(cast(Any, kind))}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown key {key!r} in the {where} configuration.{hint}")
    missing = [n for n, f in known.items() if n not in values and f.default is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"the {where} configuration lacks {', '.join(missing)}.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
