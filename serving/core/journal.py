"""An append-only file of records that survives the death of the process that writes it.

Each record is stored as its length, its CRC-32 (both 32 bits, little-endian) and its bytes. A record that is cut off or
damaged ends the file: opening it drops what follows. `append` returns when the kernel has the records, so that the
death of the process loses none; `sync` returns when the disk has them, for the death of the machine.
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
_FILE = "requests.journal"


def frame(record: bytes) -> bytes:
    """The bytes of a record in the file."""
    return _HEAD.pack(len(record), zlib.crc32(record)) + record


def read_records(data: bytes, *, begin: bool = True) -> tuple[list[bytes], int]:
    """The intact records in bytes of a file, and the number of bytes up to the end of the last one. Without `begin` the
    bytes are those after a record."""
    if begin and not data.startswith(MAGIC):
        return [], 0
    records, at = list[bytes](), len(MAGIC) if begin else 0
    while at + _HEAD.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        record = data[at + _HEAD.size : end]
        if len(record) != length or zlib.crc32(record) != checksum:
            break
        records.append(record)
        at = end
    return records, at


class JournalReader:
    """Reads the records of a folder's journal, also while another process appends to it.

    When the file was replaced, or has become shorter, it is read again from its beginning: a new file repeats all calls
    that are still known.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._file = -1  # kept open: so that no later file gets the number of its inode
        self.offset = 0
        """Bytes up to the end of the last record that was read."""
        self.size = 0
        """Bytes in the file when it was read last."""
        self.begins = 0
        """How often the reader has started at the beginning of the file. After a change, records read before no longer
        count."""

    def read(self, limit: int | None = None) -> list[bytes]:
        """The intact records that have not been read yet. With `limit`, those in the next so many bytes; all of them
        where these bytes hold no whole record. Raises OSError."""
        if not self._open():
            return []
        size = self.size - self.offset
        records = self._read(size if limit is None else min(size, limit))
        if not records and limit is not None and limit < size:
            records = self._read(size)
        return records

    def close(self) -> None:
        """Close the file; the next `read` starts at its beginning."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._restart()

    def _restart(self) -> None:
        self.offset = self.size = 0
        self.begins += 1

    def _open(self) -> bool:
        """Have the present file open. False without one."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            self.close()
            return False
        if self._file < 0 or not os.path.samestat(found, os.fstat(self._file)):
            self.close()
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(self._file).st_size
        if size < self.offset:
            self._restart()
        self.size = size
        return True

    def _read(self, size: int) -> list[bytes]:
        """The intact records among the next bytes."""
        parts, at, end = list[bytes](), self.offset, self.offset + size
        while at < end and (part := os.pread(self._file, end - at, at)):  # one call reads 2 GiB at most
            parts.append(part)
            at += len(part)
        records, read = read_records(b"".join(parts), begin=not self.offset)
        self.offset += read
        return records


class Journal:
    """The journal in one folder. A lock keeps other processes out while it is open."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._path = folder / _FILE
        self._lock = lock
        self._file = -1
        self.size = 0
        """Bytes in the file."""
        self.dirty = False
        """True when something was appended since the last `sync`."""

    @classmethod
    def open(cls, folder: Path, reader: JournalReader | None = None) -> tuple[Self, list[bytes]]:
        """Open the journal of a folder; returns it and its records, without all that `reader` read since it last
        started at the beginning. Only the owner can read folder and file. Raises StartError when they cannot be opened,
        or when another server has them open."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(f"the journal cannot be kept in {folder}: {error.strerror}.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            journal, reader = cls(folder, lock), reader or JournalReader(folder)
            records = reader.read()
            if reader.offset < reader.size:  # the end is damaged, or a reader that followed was led to a wrong place
                reader.close()
                records = reader.read()
            journal.size = reader.offset
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
        """Append all records or none. Raises OSError, for example when the disk is full, with nothing appended."""
        data = b"".join(map(frame, records))
        if not data:
            return
        try:
            _write_at(self._file, data, self.size)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.size)
            raise
        self.size += len(data)
        self.dirty = True

    def replace(self, records: Iterable[bytes]) -> None:
        """Replace all records, atomically. Raises OSError with the old records in place."""
        new = self.begin_replacement()
        new.write(records)
        self.install(new)

    def begin_replacement(self) -> "JournalReplacement":
        """Begin a file that can be written beside the journal and then installed. Raises OSError."""
        return JournalReplacement(self._path.with_suffix(".new"))

    def install(self, new: "JournalReplacement") -> None:
        """Make a replacement the journal's file. Raises OSError with the old records in place."""
        new.rename_to(self._path)
        if self._file >= 0:
            os.close(self._file)
        self._file, self.size, self.dirty = new.file, new.size, new.dirty

    def sync(self) -> None:
        """Wait until the disk has what was appended before the call. Safe from another thread. Raises OSError."""
        self.dirty = False
        with _duplicate(self._file) as file:
            os.fdatasync(file)

    def close(self) -> None:
        """Close the file, and release the lock of the folder."""
        for file in (self._file, self._lock):
            with contextlib.suppress(OSError):
                os.close(file)
        self._file = self._lock = -1


class JournalReplacement:
    """A file that will replace the journal's file. Until it is installed, the journal stays as it was; a failure
    removes the new file.

    The disk has what `write` wrote before the file is installed. It may lack what `append` added, and what was appended
    to the journal since its last `sync`: so `sync` must not be called between the beginning and the installation.
    """

    def __init__(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # the file of a process that died may still be there
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.size = 0
        self.dirty = False
        self._path = path

    def write(self, records: Iterable[bytes]) -> None:
        """Write the first records, from any thread. Raises OSError."""
        with self._removed_on_error():
            self._write_at(MAGIC)
            for record in records:
                self._write_at(frame(record))
            os.fdatasync(self.file)

    def append(self, records: Iterable[bytes]) -> None:
        """Append records. Raises OSError."""
        data = b"".join(map(frame, records))
        if data:
            with self._removed_on_error():
                self._write_at(data)
            self.dirty = True

    def rename_to(self, path: Path) -> None:
        """Rename the file to this path. Raises OSError."""
        with self._removed_on_error():
            os.rename(self._path, path)

    def _write_at(self, data: bytes) -> None:
        _write_at(self.file, data, self.size)
        self.size += len(data)

    @contextlib.contextmanager
    def _removed_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            os.close(self.file)
            with contextlib.suppress(OSError):
                self._path.unlink()
            raise


@contextlib.contextmanager
def _duplicate(file: int) -> Iterator[int]:
    """Another descriptor of the same file, because the first may be closed during a `sync`."""
    other = os.dup(file)
    try:
        yield other
    finally:
        os.close(other)


def _write_at(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written
