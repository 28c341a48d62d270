"""A JSON file of named secrets, which holds only their hashes: the common part of API key files and join token
files."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from serving.errors import InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")


class Named(Protocol):
    """An entry of such a file, a dataclass."""

    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


def hash_secret(secret: str) -> str:
    """The SHA-256 of a secret, as the files hold it."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def check_new_name(name: str, entries: Iterable[Named], noun: str) -> None:
    """Raise InvalidRequest when a name of a new entry has other letters than a log line may, or is in use."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"the name {name!r} must be 1 to 64 letters, digits, dots, dashes, underscores or @.", param="name"
        )
    if any(entry.name == name for entry in entries):
        raise InvalidRequest(f"there is a {noun} {name!r} already. Remove it first, or take another name.")


def without(entries: Sequence[Entry], name: str, noun: str) -> list[Entry]:
    """The entries but the one of this name. Raises InvalidRequest when there is none."""
    if all(entry.name != name for entry in entries):
        known = ", ".join(entry.name for entry in entries) or "none"
        raise InvalidRequest(f"there is no {noun} {name!r}; the {noun}s are: {known}.", param="name")
    return [entry for entry in entries if entry.name != name]


def write_entries(path: Path, key: str, entries: Iterable[Any]) -> None:
    """Replace the file by one with these dataclasses under `key`, readable for its owner only. A reader sees the old
    file or the new one. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({key: [dataclasses.asdict(entry) for entry in entries]}, file, indent=1)
            file.write("\n")
        os.replace(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
