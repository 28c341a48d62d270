"""Kinds of files that the planner reads: a file that is another one than was asked for is named as what it is.

An error says what was asked for, what the file is (empty, no text, no JSON, a certificate where a plan is wanted), and
the way out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from planner.errors import InputError, UnknownKey

T = TypeVar("T")

KNOWN: tuple[tuple[set[str], str], ...] = (
    ({"sha256", "verdict", "slo"}, "a certificate, as `certify --out` writes"),
    ({"prefill", "decode"}, "a plan of pools for prompts and for decode"),
    ({"plan", "workload", "cluster"}, "a plan file, as `solve --out` writes"),
    ({"deployment"}, "an answer of `moejax plan --json`"),
    ({"slots", "slots_per_rank", "ranks"}, "a plan alone, without its model and its cluster (`export --to json`)"),
    ({"form", "wanted", "served"}, "a server's counts of steps"),
    ({"summary", "kills"}, "a result of benchmarks.recovery"),
    ({"runs"}, "a result of benchmarks.throughput"),
    ({"loads"}, "loads of experts"),
    ({"model_type"}, "a model's config.json"),
    ({"moe_layers", "experts"}, "the numbers of a model"),
)
"""Files by keys that only they have."""
MOST_KEYS = 6
"""Keys of an unknown object that an error names."""


def described(value: Any) -> str:
    """A JSON value in words: which file it is, if a known one."""
    if isinstance(value, dict):
        found = next((name for keys, name in KNOWN if keys <= set(value)), None)
        if found or not value:
            return found or "an empty object"
        more = f" and {len(value) - MOST_KEYS} more" if len(value) > MOST_KEYS else ""
        return f"an object with the keys {', '.join(sorted(map(str, value))[:MOST_KEYS])}{more}"
    if isinstance(value, list):
        return f"a list of {len(value)} values"
    return f"the JSON value {json.dumps(value)[:40]}"


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """A kind of file: `no` says that something is none, as "not a plan file"; `way_out` is the sentence that says which
    file to give. Files with a `form` have this version of it."""

    no: str
    way_out: str
    form: int | None = None

    def error(self, reason: str) -> InputError:
        """The error for a text that is no file of this kind, for this reason."""
        return InputError(f"{self.no}: {reason}. {self.way_out}")

    def wrong(self, error: Exception) -> InputError:
        """The error for a value that reading it raised."""
        if isinstance(error, InputError):
            return error
        missing = isinstance(error, KeyError) and error.args
        return self.error(f"{error.args[0]} is missing" if missing else f"{type(error).__name__} {error}")

    def parse(self, text: str) -> Any:
        """The JSON value of a text. InputError for an empty text and for one that is not JSON."""
        if not text.strip():
            raise self.error("it is empty")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"it is not JSON ({error})") from None

    def parse_object(self, text: str, *keys: str) -> dict[str, Any]:
        """The JSON object of a text, which has these keys and this kind's form. InputError says what it is instead."""
        data = self.parse(text)
        if not isinstance(data, dict) or not set(keys) <= set(data):
            raise self.error(f"it is {described(data)}")
        if self.form is not None and (form := data.get("form")) != self.form:
            newer = isinstance(form, int) and form > self.form
            who = "a newer version wrote it, and reads it" if newer else "another program wrote it"
            raise self.error(f"its form is {form!r}, and this version reads form {self.form}; {who}")
        return data

    def read(self, path: str | Path, make: Callable[[str], T]) -> T:
        """The value that `make` gives of the text in a file. Its errors name the file, and so does one for a file that
        cannot be read."""
        what = self.no.split(" ", 1)[1].removeprefix("a ")
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise InputError(f"cannot read {what} {path}: {error.strerror}. {self.way_out}") from None
        except ValueError:  # a name with a zero byte, or bytes that are no text
            raise InputError(f"cannot read {what} {path}: it is no text. {self.way_out}") from None
        try:
            return make(text)
        except UnknownKey as error:
            newer = "A newer version may have written it; read it with that one."
            raise type(error)(f"{path}: {error} {newer}") from None
        except InputError as error:
            raise type(error)(f"{path}: {error}") from None
