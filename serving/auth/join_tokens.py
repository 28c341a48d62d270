"""Join tokens: which hosts may run ranks, or edges, each with a file of its own. The front's file holds names, SHA-256
hashes and expiry times; a secret is shown once, when it is made. As with API keys, 256 random bits need no slow hash.

A rank reads a model's weights and its users' prompts, and what it computes becomes their answers. A join token is
therefore worth more than an API key, and neither is ever accepted in place of the other. An edge reads prompts and
answers, and decides which clients may ask; it cannot change the server.
"""

import dataclasses
import hmac
import json
import secrets
import time
from pathlib import Path

from serving.auth.secret_file import check_new_name, hash_secret, without, write_entries
from serving.errors import InvalidRequest

PREFIX = "mjr_"
FORBIDDEN_MODE = 0o037
"""Permission bits that a file with tokens must not have."""


class JoinTokenFileError(InvalidRequest):
    """A file of join tokens, or with the secret of one, cannot be read or trusted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinToken:
    """One token as the file holds it. Times are in seconds since the epoch; with `expires` None it never expires."""

    name: str
    sha256: str
    created: float
    expires: float | None = None


@dataclasses.dataclass(frozen=True)
class JoinTokens:
    """The tokens in the front's file."""

    path: Path

    @classmethod
    def open(cls, path: Path, *, param: str = "rank_tokens") -> "JoinTokens":
        """The tokens of a file that must exist; `param` is the setting that names it. Raises JoinTokenFileError."""
        if not path.is_file():
            raise JoinTokenFileError(
                f"there is no file of join tokens {path}. Make one with `moejax tokens add NAME --file {path}`.",
                param=param,
            )
        tokens = cls(path)
        tokens.entries()
        return tokens

    def entries(self) -> list[JoinToken]:
        """All tokens, sorted by name; none when the file does not exist. Raises JoinTokenFileError."""
        if not self.path.exists():
            return []
        _check_private(self.path, "it says who may be a rank")
        try:
            found = [JoinToken(**entry) for entry in json.loads(self.path.read_text())["join_tokens"]]
        except OSError as error:
            raise JoinTokenFileError(f"cannot read {self.path}: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise JoinTokenFileError(
                f"{self.path} is no file of join tokens: {error}. `moejax tokens add` makes one."
            ) from None
        return sorted(found, key=lambda token: token.name)

    def add(self, name: str, *, valid_s: float | None = None) -> str:
        """Make a token that expires after `valid_s` seconds and return its secret, which is stored nowhere. Raises
        InvalidRequest for a bad name or one in use."""
        tokens, now = self.entries(), time.time()
        check_new_name(name, tokens, "token")
        secret = PREFIX + secrets.token_urlsafe(32)
        expires = None if valid_s is None else now + valid_s
        self._write([*tokens, JoinToken(name=name, sha256=hash_secret(secret), created=now, expires=expires)])
        return secret

    def remove(self, name: str) -> None:
        """Remove a token. Raises InvalidRequest when there is none of that name."""
        self._write(without(self.entries(), name, "token"))

    def rejection(self, secret: str, now: float) -> str | None:
        """Why the token with this secret is not valid at the time `now`, or None if it is. Compares it with all tokens,
        each in constant time."""
        hashed, found = hash_secret(secret), None
        for token in self.entries():
            if hmac.compare_digest(token.sha256, hashed):
                found = token
        if found is None:
            return "this is no join token of this server"
        if found.expires is not None and found.expires <= now:
            return f"the join token {found.name!r} has expired"
        return None

    def _write(self, tokens: list[JoinToken]) -> None:
        try:
            write_entries(self.path, "join_tokens", tokens)
        except OSError as error:
            raise JoinTokenFileError(f"cannot write {self.path}: {error.strerror}.") from None


def read_secret(path: Path) -> str:
    """The secret in a host agent's file. Raises JoinTokenFileError."""
    _check_private(path, "who reads it can be a rank")
    try:
        secret = path.read_text().strip()
    except (OSError, ValueError) as error:
        raise JoinTokenFileError(f"cannot read {path}: {error}.") from None
    if not secret.startswith(PREFIX):
        raise JoinTokenFileError(f"{path} holds no join token: they begin with {PREFIX} (`moejax tokens add NAME`).")
    return secret


def _check_private(path: Path, why: str) -> None:
    """Raise JoinTokenFileError if others may read or write the file, or its group may write it. Its group may read it:
    Kubernetes gives a secret to the group of a pod."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise JoinTokenFileError(f"cannot read {path}: {error.strerror}.") from None
    if mode & FORBIDDEN_MODE:
        raise JoinTokenFileError(f"{path} has mode {mode & 0o777:o}, and {why}. chmod 600 {path}.")
