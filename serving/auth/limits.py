"""Who may call what, and how much at once: the same rules for HTTP and gRPC, without either."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from serving.config import Settings
from serving.errors import NotPermitted, QueueFull, Unauthenticated
from serving.keys import CALLER, SHARE, KeyFile

RETRY_S = 1.0


@dataclasses.dataclass
class Guard:
    """The rules of one server. Without `keys` everybody may call; what --chaos guards stays guarded."""

    keys: KeyFile | None
    max_streams: int
    max_body_bytes: int
    max_header_bytes: int
    slow_client_s: float
    streams: int = 0
    """Generating calls now."""
    by_key: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Of these, how many came with each key."""

    @classmethod
    def of(cls, settings: Settings) -> "Guard":
        """The rules that settings ask for. Raises KeyFileError when the keys cannot be read."""
        return cls(
            keys=None if settings.api_keys is None else KeyFile.open(Path(settings.api_keys)),
            max_streams=settings.max_streams,
            max_body_bytes=settings.max_body_bytes,
            max_header_bytes=settings.max_header_bytes,
            slow_client_s=settings.slow_client_s,
        )

    def admit(self, authorization: str | None, *, admin: bool = False) -> None:
        """Let a call through by its Authorization header and note whose it is.

        Raises Unauthenticated without a known key, NotPermitted when the call is for admin keys only.
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
    def stream(self) -> Iterator[None]:
        """The place of one generating call. A key may have as many as are free, so that there are some for others.
        Raises QueueFull when there is none."""
        key, free = CALLER.get(), self.max_streams - self.streams
        if key and 0 < free <= self.by_key[key]:
            raise QueueFull(
                f"{self.by_key[key]} streams of the key {key!r} are open, and {free} of {self.max_streams} are left "
                "for others. Try again later.",
                retry_after_s=RETRY_S,
            )
        if self.streams >= self.max_streams:
            raise QueueFull(
                f"{self.streams} streams are open; the bound is {self.max_streams} (--max-streams). Try again later.",
                retry_after_s=RETRY_S,
            )
        self.streams += 1
        self.by_key[key] += 1
        try:
            yield
        finally:
            self.streams -= 1
            self.by_key[key] -= 1
