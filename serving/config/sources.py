"""Reads settings from their sources: a TOML file, MOEJAX_ variables and flags; and writes them as TOML."""

import difflib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from serving.errors import InvalidRequest

PREFIX = "MOEJAX_"
OTHER_VARIABLES = frozenset(
    {"SERVER", "API_KEY", "CA", "CLIENT_CERT", "CLIENT_KEY", "CACHE", "CONFIG", "KEYS", "TOKEN_FILE"}
)
"""MOEJAX_ variables that are not settings of a server."""
_FOREIGN = re.compile(r"LINK_\w+|(\w+_)?SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_TCP.*)?|TEST_\w+|COMPLETE|\w+_COMPLETE")
"""Variables that a front sets for its ranks, that Kubernetes sets in every pod beside a service called moejax, and of
shell completion."""
RENAMED = {"protect_cache": "kv_replication"}
"""Settings by the name they had before this release, which is still accepted."""
RENAMED_VALUES = {"dense": {"whole": "replicated", "divided": "sharded"}}
"""Values of settings by the name they had before this release, which is still accepted."""
ALIASES = {"kv_cache_dtype": "kv_cache_type"}
"""Settings by the name that vLLM has for them, which is accepted too."""
ALIAS_VALUES = {
    "kv_cache_type": {"fp8_e4m3": "fp8", "fp8_per_token_head": "fp8", "int8_per_token_head": "int8"},
}
"""Values of settings by the name that vLLM has for them, which is accepted too."""
_CLOSE_NAME = 0.75
"""Similarity, 0 to 1, from which a MOEJAX_ variable counts as a misspelt setting."""


def current_names(source: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The settings of one source, with other names and values that are accepted replaced; each one of an earlier
    release adds a note. Raises InvalidRequest for a setting that is given by two names with two values."""
    values: dict[str, Any] = {}
    for key, value in source.items():
        name = ALIASES.get(key) or RENAMED.get(key, key)
        if key in RENAMED:
            notes.append(f"the setting {key} is called {name} now; the old name goes with the next release")
            if name in source:
                continue
        new = RENAMED_VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
        if new != value:
            notes.append(f"{name} {value} is called {name} {new} now; the old value goes with the next release")
        new = _current_value(name, new)
        if key in ALIASES and name in source and _current_value(name, source[name]) != new:
            raise InvalidRequest(
                f"{key} is {value!r} and {name} is {source[name]!r}, which are the same setting. Leave one out.",
                param=name,
            )
        values[name] = new
    return values


def _current_value(name: str, value: Any) -> Any:
    """The value of a setting in place of one that other programs use for it."""
    return ALIAS_VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value


def read_file(file: Path) -> dict[str, Any]:
    """The settings in a TOML file. Raises InvalidRequest."""
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise InvalidRequest(f"cannot read {file}: {error.strerror}.", param="config") from None
    except ValueError as error:
        raise InvalidRequest(f"{file} is not valid TOML: {error}.", param="config") from None


def read_environment(environment: Mapping[str, str], known: Collection[str]) -> dict[str, str]:
    """The settings among environment variables, as text. Raises InvalidRequest for a MOEJAX_ variable whose name is
    close to a setting's; any other unknown variable may belong to another program."""
    values: dict[str, str] = {}
    for key, text in environment.items():
        name = key.removeprefix(PREFIX)
        if not key.startswith(PREFIX) or name in OTHER_VARIABLES or _FOREIGN.fullmatch(name):
            continue
        if name.lower() in known:
            values[name.lower()] = text
        elif near := difflib.get_close_matches(name.lower(), known, n=1, cutoff=_CLOSE_NAME):
            raise InvalidRequest(f"unknown variable {key}. Did you mean {PREFIX}{near[0].upper()}?", param=name.lower())
    return values


def parse(key: str, value: Any, hint: Any) -> Any:
    """The value of a setting as its type, from text or from TOML. Raises InvalidRequest."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = kinds[0]
    try:
        if typing.get_origin(kind) is tuple:
            if value == "auto":
                return ()
            rows = [r.split(",") for r in value.split(";")] if isinstance(value, str) else value
            return tuple(tuple(int(n) for n in row) for row in rows)
        if kind is bool and isinstance(value, str):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]
        if (isinstance(value, bool) and kind is not bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        if kind is str:
            return str(os.fspath(typing.cast(Any, value)))
        return kind(value)
    except (ValueError, TypeError, KeyError):
        name = getattr(kind, "__name__", kind)
        raise InvalidRequest(f"setting {key!r} is {value!r}, which is no {name}.", param=key) from None


def toml_value(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(toml_value(v) for v in value)}]"
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which JSON leaves as it is
