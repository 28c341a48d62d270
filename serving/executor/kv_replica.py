"""The format of a KV replica: a copy of one rank's KV cache in memory that outlives the rank, and the order of writing.

    header   the sizes, and the seal: the last step of which all entries are written
    tags     int32 [entries, 2]: token and position of each entry; -1 before it is written, and while it is
    rows     bytes [entries, entry_bytes]: keys and values of all layers

A rank may be killed between any two stores. An entry's tag is removed before its row is written and put back after it,
and the seal moves on after all entries of a step; the stores of a process that has ended are seen in order up to its
end. So every entry below the seal is whole. Which entries belong to a request, and not to an earlier one on the same
page, the front knows from its page tables (`serving.recovery.kv_restoration`); the reader compares token and position
all the same.
"""

import errno
import itertools
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

_MAGIC = 0x6D6A6361636865  # "mjcache"
_PAGE = 4096
_FIELDS = 4
"""int64 fields of the header: magic, entries, bytes of an entry, seal."""
UNSEALED = -1
"""The seal before the first step."""
PIECE_ENTRIES = 256
PIECE_BYTES = 16 << 20
"""Most KV entries that are restored at once, and most bytes of them."""


class NotReplicated(Exception):
    """Entries are not in a replica, or belong to another context."""


class KVReplica:
    """A mapped file in memory. The rank whose cache it replicates writes it; the front and other ranks read it once
    that rank has ended."""

    def __init__(self, file: int, memory: mmap.mmap) -> None:
        self._memory = memory
        self._header = np.frombuffer(memory, np.int64, _FIELDS)
        magic, self.entries, self.entry_bytes, _ = self._header.tolist()
        if magic != _MAGIC:
            raise NotReplicated(f"this is no KV replica: it begins with {magic:#x}, not {_MAGIC:#x}")
        self._tags = np.frombuffer(memory, np.int32, 2 * self.entries, _PAGE).reshape(-1, 2)
        self._rows_offset = _PAGE + _whole_pages(self._tags.nbytes)
        self._file = os.dup(file)

    @classmethod
    def create(cls, file: int, entries: int, entry_bytes: int) -> Self:
        """An empty replica in an open, empty file. It takes memory as it is written."""
        os.ftruncate(file, replica_bytes(entries, entry_bytes))
        memory = mmap.mmap(file, 0)
        header = np.frombuffer(memory, np.int64, _FIELDS)
        tags = np.frombuffer(memory, np.int32, 2 * entries, _PAGE)
        tags[:] = -1
        header[:] = _MAGIC, entries, entry_bytes, UNSEALED
        return cls(file, memory)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The replica in a file. Raises OSError or NotReplicated."""
        with path.open("r+b") as file:
            return cls(file.fileno(), mmap.mmap(file.fileno(), 0))

    @property
    def path(self) -> str:
        """The path at which processes of this user on this host can open it, as long as this process has it open."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @property
    def bytes(self) -> int:
        """Bytes of memory that it takes now."""
        return 512 * os.fstat(self._file).st_blocks

    @property
    def sealed(self) -> int:
        """The last step of which all entries are written."""
        return int(self._header[3])

    def write(self, entries: np.ndarray, tokens: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> None:
        """Copy entries `[n]`, n > 0, each once, of these tokens and positions `[n]`; `rows [n, ...]` are entry_bytes
        each.

        Through the file: memory that is not there yet is a fault for every page of it when it is stored to as mapped.
        Raises OSError when there is none.
        """
        self._tags[entries] = -1
        rows = np.ascontiguousarray(rows).reshape(len(entries), -1).view(np.uint8)
        for run in _runs(entries):
            together = rows[run]
            wrote = os.pwrite(self._file, together.data, self._row_offset(entries[run.start]))
            if wrote < together.nbytes:
                raise OSError(errno.ENOSPC, f"{wrote} of {together.nbytes} bytes of the replica could be written")
        self._tags[entries] = np.stack([tokens, positions], axis=-1)

    def seal(self, step: int) -> None:
        """All entries of the steps up to this one are written."""
        self._header[3] = step

    def read(
        self, entries: np.ndarray, tokens: np.ndarray, positions: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """The rows of entries, bytes `[n, entry_bytes]`, written to `out` if it is given. Raises NotReplicated unless
        they are of these tokens and positions.

        Through the file, as `write`: a page that this process has not mapped yet is a fault as well.
        """
        tags, wanted = self._tags[entries], np.stack([tokens, positions], axis=-1)
        wrong = np.flatnonzero((tags != wanted).any(axis=-1))
        if len(wrong):
            at, (token, position) = int(wrong[0]), tags[wrong[0]].tolist()
            raise NotReplicated(
                f"entry {int(entries[at])} of the replica has token {token} at position {position}, and token "
                f"{int(tokens[at])} at position {int(positions[at])} is wanted ({len(wrong)} of {len(entries)} differ)"
            )
        rows = np.empty((len(entries), self.entry_bytes), np.uint8) if out is None else out[: len(entries)]
        for run in _runs(entries):
            together = rows[run]
            if os.preadv(self._file, [together.data], self._row_offset(entries[run.start])) < together.nbytes:
                raise NotReplicated(f"the replica ends before entry {int(entries[run.stop - 1])}")
        return rows

    def _row_offset(self, entry: Any) -> int:
        """The offset of an entry's row in the file."""
        return self._rows_offset + int(entry) * self.entry_bytes

    def close(self) -> None:
        """Close the file; its memory is freed when no process has it open."""
        del self._header, self._tags
        self._memory.close()
        os.close(self._file)


def replica_bytes(entries: int, entry_bytes: int) -> int:
    """Bytes of the file when every entry has been written."""
    return _PAGE + _whole_pages(8 * entries) + entries * entry_bytes


def entry_indices(pages: Sequence[int], page_size: int, first: int, count: int) -> np.ndarray:
    """The entries of positions `first` .. `first + count - 1` of a request in these pages, `[count]`."""
    at = np.arange(first, first + count)
    return np.array(pages, np.int64)[at // page_size] * page_size + at % page_size


def piece_entries(entry_bytes: int) -> int:
    """The number of entries, of these bytes each, that are restored at once."""
    return max(1, min(PIECE_ENTRIES, PIECE_BYTES // max(1, entry_bytes)))


def _runs(entries: np.ndarray) -> Iterator[slice]:
    """Slices of consecutive entries."""
    cuts = [0, *(np.flatnonzero(np.diff(entries) != 1) + 1).tolist(), len(entries)]
    return (slice(first, after) for first, after in itertools.pairwise(cuts))


def _whole_pages(count: int) -> int:
    return -(-count // _PAGE) * _PAGE
