"""API keys: who may call. A file keeps names and SHA-256 hashes; the secret is shown once, when it is made.

A secret has 256 random bits, so a plain hash is enough: there is nothing to guess that a slow hash would protect.
"""

import contextvars
import dataclasses
import hashlib
import json
import logging
import os
import re
import secrets
import tempfile
import time
from pathlib import Path

from serving.errors import InvalidRequest, MoejaxError

log = logging.getLogger(__name__)

PREFIX = "mjx_"
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")

SHARE: contextvars.ContextVar[float] = contextvars.ContextVar("share", default=1.0)
"""How much of a busy server the running call's key gets, beside one with 1."""
CALLER: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="")
"""Name of the key the running call came with; empty when none is needed."""


class KeyFileError(InvalidRequest):
    """The file of API keys cannot be read or trusted: says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One key as it is kept. `admin` may also kill ranks; `created` is in seconds since the epoch. When the server is
    busy, a key gets tokens in proportion to its `share`."""

    name: str
    sha256: str
    admin: bool = False
    created: float = 0.0
    share: float = 1.0


class KeyFile:
    """The keys in a file. A change of the file counts from the next call on; no restart is needed."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._stamp: tuple[int, int, int] | None = None
        self._by_hash: dict[str, Key] = {}

    @classmethod
    def open(cls, path: Path) -> "KeyFile":
        """The keys of a file that must be there. Raises KeyFileError."""
        keys = cls(path)
        if not keys.path.is_file():
            raise KeyFileError(
                f"there is no key file {path}. Make one with `moejax keys add NAME --file {path}`.", param="api_keys"
            )
        keys._reload()
        return keys

    def entries(self) -> list[Key]:
        """All keys by name; none when the file is not there. Raises KeyFileError."""
        return sorted(_read(self.path), key=lambda key: key.name) if self.path.exists() else []

    def add(self, name: str, *, admin: bool = False, share: float = 1.0) -> str:
        """Make a key and return its secret, which is kept nowhere. Raises InvalidRequest on a name in use."""
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"the name {name!r} must be 1 to 64 letters, digits, dots, dashes, underscores or @.", param="name"
            )
        if not 0.01 <= share <= 100:
            raise InvalidRequest(f"the share is {share}; it must be between 0.01 and 100.", param="share")
        keys = self.entries()
        if any(key.name == name for key in keys):
            raise InvalidRequest(f"there is a key {name!r} already. Remove it first, or take another name.")
        secret = PREFIX + secrets.token_urlsafe(32)
        self._write([*keys, Key(name=name, sha256=_hash(secret), admin=admin, created=time.time(), share=share)])
        return secret

    def remove(self, name: str) -> None:
        """Forget a key. Raises InvalidRequest when there is none of that name."""
        keys = self.entries()
        if all(key.name != name for key in keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise InvalidRequest(f"there is no key {name!r}; the keys are: {known}.", param="name")
        self._write([key for key in keys if key.name != name])

    def find(self, secret: str) -> Key | None:
        """The key of a secret; None when it is not known. Reads the file again when it has changed."""
        try:
            state = os.stat(self.path)
            if (state.st_mtime_ns, state.st_size, state.st_ino) != self._stamp:
                self._reload()
        except (OSError, MoejaxError) as error:
            log.warning("the key file cannot be read; the keys known so far count on: %s", error)
        return self._by_hash.get(_hash(secret))

    def _reload(self) -> None:
        state = os.stat(self.path)
        self._by_hash = {key.sha256: key for key in _read(self.path)}
        self._stamp = (state.st_mtime_ns, state.st_size, state.st_ino)

    def _write(self, keys: list[Key]) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")  # mode 0600
            with os.fdopen(handle, "w") as file:
                json.dump({"keys": [dataclasses.asdict(key) for key in keys]}, file, indent=1)
                file.write("\n")
            os.replace(draft, self.path)
        except OSError as error:
            raise KeyFileError(f"cannot write {self.path}: {error.strerror}.") from None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def _read(path: Path) -> list[Key]:
    try:
        if path.stat().st_mode & 0o022:
            raise KeyFileError(
                f"{path} can be written by others (mode {path.stat().st_mode & 0o777:o}): whoever writes it can call. "
                f"chmod 600 {path}."
            )
        return [Key(**entry) for entry in json.loads(path.read_text())["keys"]]
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}.", param="api_keys") from None
    except (ValueError, KeyError, TypeError) as error:
        raise KeyFileError(f"{path} is no key file: {error}. `moejax keys add` makes one.", param="api_keys") from None
