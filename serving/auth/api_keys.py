"""API keys: who may call the server. A file holds names and SHA-256 hashes; a secret is shown once, when it is made.

A secret has 256 random bits, so a plain hash is enough: a slow hash protects only secrets that can be guessed.
"""

import contextvars
import dataclasses
import json
import logging
import os
import secrets
import time
from pathlib import Path

from serving.auth.secret_file import check_new_name, hash_secret, without, write_entries
from serving.errors import InvalidRequest, MoejaxError

log = logging.getLogger(__name__)

PREFIX = "mjx_"

SHARE: contextvars.ContextVar[float] = contextvars.ContextVar("share", default=1.0)
"""The share of a busy server that the running call's key gets, relative to a key with share 1."""
CALLER: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="")
"""The name of the key that the running call came with; empty when the server needs none."""


class ApiKeyFileError(InvalidRequest):
    """The file of API keys cannot be read or trusted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One key as the file holds it. An `admin` key may also kill ranks and change the server. `created` is in seconds
    since the epoch. When the server is busy, a key gets tokens in proportion to its `share`."""

    name: str
    sha256: str
    admin: bool = False
    created: float = 0.0
    share: float = 1.0


class ApiKeyFile:
    """The keys in a file. A change of the file takes effect at the next call, without a restart."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._stamp: tuple[int, int, int] | None = None
        self._by_hash: dict[str, ApiKey] = {}

    @classmethod
    def open(cls, path: Path) -> "ApiKeyFile":
        """The keys of a file that must exist. Raises ApiKeyFileError."""
        keys = cls(path)
        if not keys.path.is_file():
            raise ApiKeyFileError(
                f"there is no key file {path}. Make one with `moejax keys add NAME --file {path}`.", param="api_keys"
            )
        keys._reload()
        return keys

    def entries(self) -> list[ApiKey]:
        """All keys, sorted by name; none when the file does not exist. Raises ApiKeyFileError."""
        return sorted(_read(self.path), key=lambda key: key.name) if self.path.exists() else []

    def add(self, name: str, *, admin: bool = False, share: float = 1.0) -> str:
        """Make a key and return its secret, which is stored nowhere. Raises InvalidRequest for a bad name or share."""
        keys = self.entries()
        check_new_name(name, keys, "key")
        if not 0.01 <= share <= 100:
            raise InvalidRequest(f"the share is {share}; it must be between 0.01 and 100.", param="share")
        secret = PREFIX + secrets.token_urlsafe(32)
        key = ApiKey(name=name, sha256=hash_secret(secret), admin=admin, created=time.time(), share=share)
        self._write([*keys, key])
        return secret

    def remove(self, name: str) -> None:
        """Remove a key. Raises InvalidRequest when there is none of that name."""
        self._write(without(self.entries(), name, "key"))

    def find(self, secret: str) -> ApiKey | None:
        """The key with this secret, or None. Reads the file again when it has changed."""
        try:
            state = os.stat(self.path)
            if (state.st_mtime_ns, state.st_size, state.st_ino) != self._stamp:
                self._reload()
        except (OSError, MoejaxError) as error:
            log.warning("the key file cannot be read; the keys read before stay valid: %s", error)
        return self._by_hash.get(hash_secret(secret))

    def _reload(self) -> None:
        state = os.stat(self.path)
        self._by_hash = {key.sha256: key for key in _read(self.path)}
        self._stamp = (state.st_mtime_ns, state.st_size, state.st_ino)

    def _write(self, keys: list[ApiKey]) -> None:
        try:
            write_entries(self.path, "keys", keys)
        except OSError as error:
            raise ApiKeyFileError(f"cannot write {self.path}: {error.strerror}.") from None


def _read(path: Path) -> list[ApiKey]:
    try:
        if path.stat().st_mode & 0o022:
            raise ApiKeyFileError(
                f"{path} can be written by others (mode {path.stat().st_mode & 0o777:o}), who could then call the "
                f"server. chmod 600 {path}."
            )
        return [ApiKey(**entry) for entry in json.loads(path.read_text())["keys"]]
    except OSError as error:
        raise ApiKeyFileError(f"cannot read {path}: {error.strerror}.", param="api_keys") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ApiKeyFileError(
            f"{path} is no key file: {error}. `moejax keys add` makes one.", param="api_keys"
        ) from None
