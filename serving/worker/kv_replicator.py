"""A rank's end of the protection of its cache: what is written there is copied to memory that outlives the rank."""

from pathlib import Path
from typing import Self

import numpy as np

from serving.cache_copy import CacheCopy, NotCopied, entries_of
from serving.proto.moejax.v1 import link_pb2

MESSAGE_BYTES = 16 << 20
"""Rows in one message, at most."""


class Protector:
    """Copies to memory that it shares with the front, or keeps what is to be told to the front."""

    def __init__(self, shared: CacheCopy | None) -> None:
        self._shared = shared
        self._told: list[link_pb2.Copied] = []

    @classmethod
    def of(cls, command: link_pb2.Configure | link_pb2.Adopt) -> Self | None:
        """As the front wants it; None when nothing is copied. A rank that may not open its copy tells what belongs
        there."""
        which = command.WhichOneof("protection")
        if which is None:
            return None
        try:
            return cls(CacheCopy.open(Path(command.cache_copy)) if which == "cache_copy" else None)
        except (OSError, NotCopied):
            return cls(None)

    @property
    def path(self) -> str:
        """Where the next front can open what is shared with this one; "" if nothing is."""
        return self._shared.path if self._shared is not None else ""

    def copy(self, entries: np.ndarray, tokens: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> None:
        """Entries `[n]` of the cache have these tokens, positions and `rows [n, L, widths]` now."""
        if not len(entries):
            return
        if self._shared is not None:
            self._shared.write(entries, tokens, positions, rows)
            return
        most = max(1, MESSAGE_BYTES // rows[0].nbytes)
        for at in range(0, len(entries), most):
            part = slice(at, at + most)
            entry, token, position = (each[part].astype(np.int32).tobytes() for each in (entries, tokens, positions))
            self._told.append(
                link_pb2.Copied(entries=entry, tokens=token, positions=position, rows=rows[part].tobytes())
            )

    def seal(self, step: int) -> None:
        """All that was written up to this step has been copied."""
        if self._shared is not None:
            self._shared.seal(step)
        else:
            self._told.append(link_pb2.Copied(sealed=step))

    def close(self) -> None:
        """Let go of the copy; it stays with the front."""
        if self._shared is not None:
            self._shared.close()

    def told(self) -> list[link_pb2.Copied]:
        """What the front has not been told yet, in order; each once."""
        told, self._told = self._told, []
        return told


def restored_rows(command: link_pb2.RestoreCache, page_size: int, into: np.ndarray | None = None) -> np.ndarray:
    """The entries a rank is to take over, bytes `[count, entry bytes]`, read `into` memory of as many entries or more.
    Raises OSError, and NotCopied when the copy has something else there."""
    if not command.cache_copy:
        return np.frombuffer(command.rows, np.uint8).reshape(command.count, -1)
    copy = CacheCopy.open(Path(command.cache_copy))
    try:
        entries = entries_of(command.from_pages, page_size, command.first, command.count)
        positions = np.arange(command.first, command.first + command.count)
        return copy.read(entries, np.frombuffer(command.tokens, np.int32), positions, into)
    finally:
        copy.close()
