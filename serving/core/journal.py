"""An append-only file of records that outlives the process that writes it, however that ends.

Each record stands as its length, its CRC-32 and its bytes (little-endian). A record that is cut off or damaged ends
the file: what follows is dropped when it is opened. What has been appended is the kernel's before `append` returns, so
the death of the process loses nothing; `sync` makes it the disk's, for the death of the machine.
"""

import contextlib
import fcntl
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from serving.errors import StartError

MAGIC = b"moejax journal 1\n"
_HEAD = struct.Struct("<II")


def frame(record: bytes) -> bytes:
    """A record as it stands in the file."""
    return _HEAD.pack(len(record), zlib.crc32(record)) + record


def read(data: bytes) -> tuple[list[bytes], int]:
    """The whole records of a file's bytes, and how many bytes they take with what stands before them."""
    if not data.startswith(MAGIC):
        return [], 0
    records, at = [], len(MAGIC)
    while at + _HEAD.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        record = data[at + _HEAD.size : end]
        if len(record) != length or zlib.crc32(record) != checksum:
            break
        records.append(record)
        at = end
    return records, at


class Journal:
    """The records of one folder, which is this process's alone while the journal is open."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._path = folder / "requests.journal"
        self._lock = lock
        self._file = -1
        self.size = 0
        """Bytes of the file."""
        self.dirty = False
        """Something was appended since the last `sync`."""

    @classmethod
    def open(cls, folder: Path) -> tuple[Self, list[bytes]]:
        """A journal and the records in it; folder and file are for their owner only. Raises StartError when they
        cannot be had, or another server has them."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(f"the journal cannot be kept in {folder}: {error.strerror}.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            journal = cls(folder, lock)
            data = journal._path.read_bytes() if journal._path.exists() else b""
            records, journal.size = read(data)
            if not journal.size:
                journal.replace([])
            else:
                journal._file = os.open(journal._path, os.O_WRONLY | os.O_CLOEXEC)
                os.ftruncate(journal._file, journal.size)
        except OSError as error:
            os.close(lock)
            why = "another server has it" if isinstance(error, BlockingIOError) else error.strerror
            raise StartError(f"the journal in {folder} cannot be opened: {why}.") from error
        return journal, records

    def append(self, records: Iterable[bytes]) -> None:
        """Add records, all or none. Raises OSError (the disk is full, say) with nothing added."""
        data = b"".join(map(frame, records))
        if not data:
            return
        try:
            _write(self._file, data, self.size)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.size)
            raise
        self.size += len(data)
        self.dirty = True

    def replace(self, records: Iterable[bytes]) -> None:
        """Have these records and no others, at once or not at all. Raises OSError with the old ones in place."""
        new = self.rewrite()
        new.write(records)
        self.take(new)

    def rewrite(self) -> "Rewriting":
        """Begin another file, which may be written beside this one and then taken. Raises OSError."""
        return Rewriting(self._path.with_suffix(".new"))

    def take(self, new: "Rewriting") -> None:
        """Have what was written anew and nothing else. Raises OSError with the old records in place."""
        new.finish(self._path)
        if self._file >= 0:
            os.close(self._file)
        self._file, self.size, self.dirty = new.file, new.size, new.dirty

    def sync(self) -> None:
        """Wait until the disk has what was appended before. Safe from another thread. Raises OSError."""
        self.dirty = False
        with _duplicate(self._file) as file:
            os.fdatasync(file)

    def close(self) -> None:
        """Leave the folder to others."""
        for file in (self._file, self._lock):
            with contextlib.suppress(OSError):
                os.close(file)
        self._file = self._lock = -1


class Rewriting:
    """A file that is to take the place of a journal's. Until it does, the journal is what it was; a failure removes it.

    The disk has what is written here before the file takes its place. What is added last it may lack, as it may of what
    has been appended since the journal's last `sync`: there must be none between the beginning and the end of this.
    """

    def __init__(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # another process may still write to that one
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.size = 0
        self.dirty = False
        self._path = path

    def write(self, records: Iterable[bytes]) -> None:
        """Write these first, from any thread. Raises OSError."""
        with self._or_nothing():
            self._write(MAGIC)
            for record in records:
                self._write(frame(record))
            os.fdatasync(self.file)

    def add(self, records: Iterable[bytes]) -> None:
        """Write these behind. Raises OSError."""
        data = b"".join(map(frame, records))
        if data:
            with self._or_nothing():
                self._write(data)
            self.dirty = True

    def finish(self, place: Path) -> None:
        """Be the file of this path. Raises OSError."""
        with self._or_nothing():
            os.rename(self._path, place)

    def _write(self, data: bytes) -> None:
        _write(self.file, data, self.size)
        self.size += len(data)

    @contextlib.contextmanager
    def _or_nothing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            os.close(self.file)
            with contextlib.suppress(OSError):
                self._path.unlink()
            raise


@contextlib.contextmanager
def _duplicate(file: int) -> Iterator[int]:
    """Another descriptor of the same file: the first may be closed meanwhile."""
    other = os.dup(file)
    try:
        yield other
    finally:
        os.close(other)


def _write(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written
