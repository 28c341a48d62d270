"""A copy of one rank's cache in memory that outlives the rank: its form, and the order in which it is written.

    header   the sizes, and the seal: the last step of which everything is here
    tags     int32 [entries, 2]: token and position of each entry; -1 while it is being written, and before
    rows     bytes [entries, entry_bytes]: keys and values of all layers

A rank may be killed between any two stores. An entry's tag is taken away before its row is written and put back after
it, and the seal moves on after all entries of a step; the stores of a process that has ended are seen up to where it
ended, in their order. So whatever stands below the seal is whole. Which of it is a request's, and not what an earlier
request left on the same page, the front knows from its page tables (`serving.restoration.copied`); the reader compares
token and position all the same.
"""

import errno
import itertools
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

_FORM = 0x6D6A6361636865  # "mjcache"
_PAGE = 4096
_FIELDS = 4
"""int64 of the header: form, entries, bytes of an entry, seal."""
NOTHING = -1
"""The seal before the first step."""
PIECE_ENTRIES = 256
PIECE_BYTES = 16 << 20
"""Cache entries that are given back at once, and their bytes, at most."""


class NotCopied(Exception):
    """Entries are not in a copy, or belong to something else."""


class CacheCopy:
    """A file in memory, mapped. The rank that it copies writes; the front and other ranks read once that has ended."""

    def __init__(self, file: int, memory: mmap.mmap) -> None:
        self._memory = memory
        self._header = np.frombuffer(memory, np.int64, _FIELDS)
        form, self.entries, self.entry_bytes, _ = self._header.tolist()
        if form != _FORM:
            raise NotCopied(f"this is no copy of a cache: it begins with {form:#x}, not {_FORM:#x}")
        self._tags = np.frombuffer(memory, np.int32, 2 * self.entries, _PAGE).reshape(-1, 2)
        self._at = _PAGE + _whole_pages(self._tags.nbytes)
        self._file = os.dup(file)

    @classmethod
    def create(cls, file: int, entries: int, entry_bytes: int) -> Self:
        """An empty copy in a file that is open and empty. It takes memory as it is written on."""
        os.ftruncate(file, size_of(entries, entry_bytes))
        memory = mmap.mmap(file, 0)
        header = np.frombuffer(memory, np.int64, _FIELDS)
        tags = np.frombuffer(memory, np.int32, 2 * entries, _PAGE)
        tags[:] = -1
        header[:] = _FORM, entries, entry_bytes, NOTHING
        return cls(file, memory)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The copy in a file. Raises OSError and NotCopied."""
        with path.open("r+b") as file:
            return cls(file.fileno(), mmap.mmap(file.fileno(), 0))

    @property
    def path(self) -> str:
        """Where processes of this user on this machine can open it, as long as this process has it."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @property
    def bytes(self) -> int:
        """Memory it takes now."""
        return 512 * os.fstat(self._file).st_blocks

    @property
    def sealed(self) -> int:
        """The last step of which everything is here."""
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
            wrote = os.pwrite(self._file, together.data, self._place(entries[run.start]))
            if wrote < together.nbytes:
                raise OSError(errno.ENOSPC, f"{wrote} of {together.nbytes} bytes of the copy could be written")
        self._tags[entries] = np.stack([tokens, positions], axis=-1)

    def seal(self, step: int) -> None:
        """Everything that was written up to this step is here."""
        self._header[3] = step

    def read(
        self, entries: np.ndarray, tokens: np.ndarray, positions: np.ndarray, into: np.ndarray | None = None
    ) -> np.ndarray:
        """The rows of entries, bytes `[n, entry_bytes]`, in memory of the caller's if it gives some. Raises NotCopied
        unless they are of these tokens and positions.

        Through the file, as `write`: a page that this process has not mapped yet is a fault as well.
        """
        tags, wanted = self._tags[entries], np.stack([tokens, positions], axis=-1)
        wrong = np.flatnonzero((tags != wanted).any(axis=-1))
        if len(wrong):
            at, (token, position) = int(wrong[0]), tags[wrong[0]].tolist()
            raise NotCopied(
                f"entry {int(entries[at])} of the copy has token {token} at position {position}, and token "
                f"{int(tokens[at])} at position {int(positions[at])} is wanted ({len(wrong)} of {len(entries)} differ)"
            )
        rows = np.empty((len(entries), self.entry_bytes), np.uint8) if into is None else into[: len(entries)]
        for run in _runs(entries):
            together = rows[run]
            if os.preadv(self._file, [together.data], self._place(entries[run.start])) < together.nbytes:
                raise NotCopied(f"the copy ends before entry {int(entries[run.stop - 1])}")
        return rows

    def _place(self, entry: Any) -> int:
        """Where an entry's row is in the file."""
        return self._at + int(entry) * self.entry_bytes

    def close(self) -> None:
        """Let go of the memory; it is freed when all have."""
        del self._header, self._tags
        self._memory.close()
        os.close(self._file)


def size_of(entries: int, entry_bytes: int) -> int:
    """Bytes of the file when every entry has been written."""
    return _PAGE + _whole_pages(8 * entries) + entries * entry_bytes


def entries_of(pages: Sequence[int], page_size: int, first: int, count: int) -> np.ndarray:
    """The entries of positions `first` .. `first + count - 1` of a request in these pages, `[count]`."""
    at = np.arange(first, first + count)
    return np.array(pages, np.int64)[at // page_size] * page_size + at % page_size


def piece_of(entry_bytes: int) -> int:
    """Entries of these bytes that are given back at once."""
    return max(1, min(PIECE_ENTRIES, PIECE_BYTES // max(1, entry_bytes)))


def _runs(entries: np.ndarray) -> Iterator[slice]:
    """The entries that lie one after the other."""
    cuts = [0, *(np.flatnonzero(np.diff(entries) != 1) + 1).tolist(), len(entries)]
    return (slice(first, after) for first, after in itertools.pairwise(cuts))


def _whole_pages(count: int) -> int:
    return -(-count // _PAGE) * _PAGE
