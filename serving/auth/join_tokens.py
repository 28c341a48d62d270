"""Join tokens: who may keep a place for a rank. The front's file has names, SHA-256 hashes and when each ends; the
secret is shown once, when it is made. As with API keys, 256 random bits need no slow hash.

A rank reads a model's weights and its users' tokens, and its answers become theirs: a join token is worth more than an
API key, is never taken for one, and neither is the other way round.
"""

import contextlib
import dataclasses
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
import time
from pathlib import Path

from serving.errors import InvalidRequest

PREFIX = "mjr_"
FORBIDDEN = 0o037
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")


class TokenFileError(InvalidRequest):
    """A file of join tokens, or with the secret of one, cannot be read or trusted: says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinToken:
    """One token as it is kept. Times are in seconds since the epoch; `expires` None is never."""

    name: str
    sha256: str
    created: float
    expires: float | None = None


@dataclasses.dataclass(frozen=True)
class JoinTokens:
    """The tokens in a file of the front's."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> "JoinTokens":
        """Of a file that must be there. Raises TokenFileError."""
        if not path.is_file():
            raise TokenFileError(
                f"there is no file of join tokens {path}. Make one with `moejax tokens add NAME --file {path}`.",
                param="rank_tokens",
            )
        tokens = cls(path)
        tokens.entries()
        return tokens

    def entries(self) -> list[JoinToken]:
        """All tokens by name; none when the file is not there. Raises TokenFileError."""
        if not self.path.exists():
            return []
        _refuse_others(self.path, "it says who may be a rank")
        try:
            found = [JoinToken(**entry) for entry in json.loads(self.path.read_text())["join_tokens"]]
        except OSError as error:
            raise TokenFileError(f"cannot read {self.path}: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise TokenFileError(
                f"{self.path} is no file of join tokens: {error}. `moejax tokens add` makes one."
            ) from None
        return sorted(found, key=lambda token: token.name)

    def add(self, name: str, *, valid_s: float | None = None) -> str:
        """Make a token, for so long, and return its secret, which is kept nowhere. Raises InvalidRequest."""
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"the name {name!r} must be 1 to 64 letters, digits, dots, dashes, underscores or @.", param="name"
            )
        tokens, now = self.entries(), time.time()
        if any(token.name == name for token in tokens):
            raise InvalidRequest(f"there is a token {name!r} already. Remove it first, or take another name.")
        secret = PREFIX + secrets.token_urlsafe(32)
        expires = None if valid_s is None else now + valid_s
        self._write([*tokens, JoinToken(name=name, sha256=_hash(secret), created=now, expires=expires)])
        return secret

    def remove(self, name: str) -> None:
        """Forget a token. Raises InvalidRequest when there is none of that name."""
        tokens = self.entries()
        if all(token.name != name for token in tokens):
            known = ", ".join(token.name for token in tokens) or "none"
            raise InvalidRequest(f"there is no token {name!r}; the tokens are: {known}.", param="name")
        self._write([token for token in tokens if token.name != name])

    def why_not(self, secret: str, now: float) -> str | None:
        """None for a token that counts; else why it does not. All are compared, each in constant time."""
        hashed, found = _hash(secret), None
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
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")  # mode 0600
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump({"join_tokens": [dataclasses.asdict(token) for token in tokens]}, file, indent=1)
                    file.write("\n")
                os.replace(draft, self.path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(draft)
        except OSError as error:
            raise TokenFileError(f"cannot write {self.path}: {error.strerror}.") from None


def read_secret(path: Path) -> str:
    """The secret in a rank's own file. Raises TokenFileError."""
    _refuse_others(path, "who reads it can be a rank")
    try:
        secret = path.read_text().strip()
    except (OSError, ValueError) as error:
        raise TokenFileError(f"cannot read {path}: {error}.") from None
    if not secret.startswith(PREFIX):
        raise TokenFileError(f"{path} holds no join token: they begin with {PREFIX} (`moejax tokens add NAME`).")
    return secret


def _refuse_others(path: Path, why: str) -> None:
    """A group may read such files, as Kubernetes gives a secret to the group of a pod; nobody else may anything."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise TokenFileError(f"cannot read {path}: {error.strerror}.") from None
    if mode & FORBIDDEN:
        raise TokenFileError(f"{path} has mode {mode & 0o777:o}, and {why}. chmod 600 {path}.")


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()
