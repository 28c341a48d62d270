"""The rules for accepting calls, and their number at once: the same for HTTP and gRPC."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from serving.auth.api_keys import CALLER, SHARE, ApiKeyFile
from serving.config import SecuritySettings
from serving.errors import NotPermitted, QueueFull, Unauthenticated

RETRY_S = 1.0
"""Seconds after which a caller that was refused a stream should try again."""


@dataclasses.dataclass
class CallLimits:
    """The rules of one server, and its open streams. Without `keys` everybody may call, but kills still need
    --chaos."""

    keys: ApiKeyFile | None
    max_streams: int
    max_body_bytes: int
    max_header_bytes: int
    slow_client_s: float
    streams: int = 0
    """Generating calls that are open now."""
    streams_by_key: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Open generating calls by the name of their key."""

    @classmethod
    def of(cls, settings: SecuritySettings) -> "CallLimits":
        """The rules that the settings ask for. Raises ApiKeyFileError when the keys cannot be read."""
        return cls(
            keys=None if settings.api_keys is None else ApiKeyFile.open(Path(settings.api_keys)),
            max_streams=settings.max_streams,
            max_body_bytes=settings.max_body_bytes,
            max_header_bytes=settings.max_header_bytes,
            slow_client_s=settings.slow_client_s,
        )

    def authorize(self, authorization: str | None, *, admin: bool = False) -> None:
        """Check a call's Authorization header, and set CALLER and SHARE to those of its key.

        Raises Unauthenticated without a known key, and NotPermitted when the call needs an admin key.
        """
        if self.keys is None:
            return
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Unauthenticated('this server wants an API key: send "Authorization: Bearer KEY".')
        key = self.keys.find(secret.strip())
        if key is None:
            raise Unauthenticated("this API key is not known. Ask the operator for one (`moejax keys add`).")
        if admin and not key.admin:
            raise NotPermitted(f"the key {key.name!r} may not do this; it takes one made with `keys add --admin`.")
        CALLER.set(key.name)
        SHARE.set(key.share)

    @contextlib.contextmanager
    def open_stream(self) -> Iterator[None]:
        """Count one generating call as open while the context is entered. A key may have as many streams as are free,
        so that others get some. Raises QueueFull when there is none for it."""
        key, free = CALLER.get(), self.max_streams - self.streams
        own = self.streams_by_key[key]
        if key and 0 < free <= own:
            raise QueueFull(
                f"{own} streams of the key {key!r} are open, and {free} of {self.max_streams} are left "
                "for others. Try again later.",
                retry_after_s=RETRY_S,
            )
        if self.streams >= self.max_streams:
            raise QueueFull(
                f"{self.streams} streams are open; the bound is {self.max_streams} (--max-streams). Try again later.",
                retry_after_s=RETRY_S,
            )
        self.streams += 1
        self.streams_by_key[key] += 1
        try:
            yield
        finally:
            self.streams -= 1
            self.streams_by_key[key] -= 1
