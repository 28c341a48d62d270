"""A rank's side of KV replication: what steps write to its cache is copied to memory that outlives the rank."""

from pathlib import Path
from typing import Self

import numpy as np

from serving.executor.kv_replica import KVReplica, NotReplicated, entry_indices
from serving.proto.moejax.v1 import link_pb2

MESSAGE_BYTES = 16 << 20
"""Most bytes of rows in one message."""


class KVReplicator:
    """Copies cache entries to a replica in memory shared with the front, or makes messages of them for the front."""

    def __init__(self, shared: KVReplica | None) -> None:
        self._shared = shared
        self._outgoing: list[link_pb2.Copied] = []

    @classmethod
    def of(cls, command: link_pb2.Configure | link_pb2.Adopt) -> Self | None:
        """The replicator that the front asks for; None when it asks for none. A rank that may not open its replica
        makes messages."""
        which = command.WhichOneof("protection")
        if which is None:
            return None
        try:
            return cls(KVReplica.open(Path(command.cache_copy)) if which == "cache_copy" else None)
        except (OSError, NotReplicated):
            return cls(None)

    @property
    def path(self) -> str:
        """Where the next front can open the shared replica; "" without one."""
        return self._shared.path if self._shared is not None else ""

    def copy(self, entries: np.ndarray, tokens: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> None:
        """Copy cache entries `[n]`, with their tokens and positions `[n]`, and their bytes `rows [n, L, bytes
        of a layer]`."""
        if not len(entries):
            return
        if self._shared is not None:
            self._shared.write(entries, tokens, positions, rows)
            return
        most = max(1, MESSAGE_BYTES // rows[0].nbytes)
        for at in range(0, len(entries), most):
            part = slice(at, at + most)
            entry, token, position = (each[part].astype(np.int32).tobytes() for each in (entries, tokens, positions))
            self._outgoing.append(
                link_pb2.Copied(entries=entry, tokens=token, positions=position, rows=rows[part].tobytes())
            )

    def seal(self, step: int) -> None:
        """Mark everything that was written up to this step as copied."""
        if self._shared is not None:
            self._shared.seal(step)
        else:
            self._outgoing.append(link_pb2.Copied(sealed=step))

    def close(self) -> None:
        """Close the replica. It stays with the front."""
        if self._shared is not None:
            self._shared.close()

    def take_messages(self) -> list[link_pb2.Copied]:
        """The messages that were not sent yet, in order. Each is returned once."""
        messages, self._outgoing = self._outgoing, []
        return messages


def restored_rows(command: link_pb2.RestoreCache, page_size: int, into: np.ndarray | None = None) -> np.ndarray:
    """The entries that a rank restores, bytes `[count, entry bytes]`, read `into` memory for as many entries or more.
    Raises OSError, and NotReplicated when the replica has something else there."""
    if not command.cache_copy:
        return np.frombuffer(command.rows, np.uint8).reshape(command.count, -1)
    replica = KVReplica.open(Path(command.cache_copy))
    try:
        entries = entry_indices(command.from_pages, page_size, command.first, command.count)
        positions = np.arange(command.first, command.first + command.count)
        return replica.read(entries, np.frombuffer(command.tokens, np.int32), positions, into)
    finally:
        replica.close()
