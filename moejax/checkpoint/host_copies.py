"""Copies of models in the host's memory: made once, shared by all ranks, bounded in size, pruned when idle.

    /dev/shm/moejax-<uid>/<model>-<content hash>/     one copy; only this user may read it
        in-use                                        every reader holds a shared lock on it while it lives
        source                                        the path of the model folder that it was copied from

The kernel drops a lock with its process, so a copy without locks is idle. Idle copies are removed when another version
of their model is copied, and, least recently used first, when a new copy needs the space. A copy stays for GRACE_S
after its last use, the longest that a server takes between making it and opening it.
"""

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moejax.checkpoint.errors import StoreMissing, StoreRefused
from moejax.checkpoint.manifest import FILE, CheckpointError, content_hash
from moejax.config.model_config import ModelConfig

TMPFS = Path("/dev/shm")
LIMIT_VARIABLE = "MOEJAX_STORE_MIB"
"""Environment variable: the size of all copies together. Half of tmpfs unless given."""
LOCK_FILE = "in-use"
SOURCE_FILE = "source"
GRACE_S = 600.0
_VERSION = re.compile(r"(.+)-[0-9a-f]{16}")


@dataclasses.dataclass(frozen=True)
class HostCopy:
    """One copy: its bytes, when it was last used (seconds since 1970), and whether a process reads it now."""

    folder: Path
    bytes: int
    used: float
    busy: bool

    @property
    def idle(self) -> bool:
        """True if it may be removed."""
        return not self.busy and time.time() - self.used > GRACE_S


def ensure_copy(model_folder: Path, place: Path | None = None) -> Path:
    """The folder to read a model's weights from: its copy, made now if need be, or `model_folder` itself.

    The latter, with a warning, where the copy would be too large for the bound on all copies, for tmpfs, or for half
    of the memory that is free. Raises StoreRefused for a folder of another owner, CheckpointError when copying fails.
    """
    if place is None:
        name = ModelConfig.load(model_folder).name
        place = TMPFS / f"moejax-{os.getuid()}" / f"{name}-{content_hash(model_folder)}"
    parent = place.parent
    if not parent.parent.is_dir():
        warnings.warn(f"{parent.parent} does not exist; reading {model_folder}.", stacklevel=3)
        return model_folder
    _ensure_private(parent)
    with _exclusive(parent):
        _remove_drafts(parent)
        _remove(copy.folder for copy in list_copies(parent) if copy.idle and _is_other_version(copy.folder, place))
        sizes = _sizes(model_folder)
        if place.is_dir() and _sizes(place) == sizes:
            (place / LOCK_FILE).touch()
            _note_source(place, model_folder)
            return place
        needed, room = sum(sizes.values()), _free_space_for(parent, sum(sizes.values()), place)
        if room < needed:
            warnings.warn(
                f"{parent} has room for {room >> 20} MiB, the weights need {needed >> 20} MiB; reading {model_folder}, "
                f"so experts will be recovered at the speed of that disk. {LIMIT_VARIABLE} bounds all copies together.",
                stacklevel=3,
            )
            return model_folder
        _copy(model_folder, place, list(sizes))
        return place


def source_of(folder: Path) -> Path | None:
    """The model folder that a copy was made from; None for a folder that is no copy."""
    try:
        return Path((folder / SOURCE_FILE).read_text("utf-8"))
    except OSError:
        return None


def hold_copy(folder: Path) -> IO[str] | None:
    """Lock a copy as in use until the returned file is closed. None for a folder that is no copy.

    Raises StoreMissing when another process is removing it.
    """
    path = folder / LOCK_FILE
    if not path.is_file():
        return None
    lock = path.open("r+")
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.utime(path)
    except OSError:
        lock.close()
        raise StoreMissing(f"{folder} is being removed; start again.") from None
    return lock


def list_copies(parent: Path) -> list[HostCopy]:
    """All copies in a folder, least recently used first."""
    found = []
    for folder in (each for each in parent.iterdir() if each.is_dir() and not each.name.startswith(".")):
        path = folder / LOCK_FILE
        with contextlib.suppress(FileNotFoundError):
            if not path.is_file():
                path.touch()  # made by a version without lock files: counts as used now
            found.append(HostCopy(folder, _bytes(folder), path.stat().st_mtime, _is_busy(path)))
    return sorted(found, key=lambda copy: copy.used)


def _free_space_for(parent: Path, needed: int, place: Path) -> int:
    """Bytes that a new copy may have, after removing idle ones as far as that helps."""
    for copy in list_copies(parent):
        if copy.folder == place or _available_bytes(parent) >= needed:
            continue
        if copy.idle:
            _remove([copy.folder])
    return _available_bytes(parent)


def _available_bytes(parent: Path) -> int:
    usage = shutil.disk_usage(parent)
    given = os.environ.get(LIMIT_VARIABLE, "")
    limit = int(given) << 20 if given.isdecimal() else usage.total // 2
    return max(0, min(limit - sum(copy.bytes for copy in list_copies(parent)), usage.free, _free_memory() // 2))


def _free_memory() -> int:
    """Bytes of memory that are available without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def _is_other_version(folder: Path, place: Path) -> bool:
    ours, theirs = _VERSION.fullmatch(place.name), _VERSION.fullmatch(folder.name)
    return bool(ours and theirs and ours[1] == theirs[1] and folder != place)


def _is_busy(path: Path) -> bool:
    with path.open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _remove(folders: Iterator[Path] | list[Path]) -> None:
    """Remove copies that no process has opened in the meantime."""
    for folder in folders:
        with contextlib.suppress(OSError), (folder / LOCK_FILE).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _remove_drafts(parent: Path) -> None:
    """Remove drafts of processes that were killed; the caller holds the lock, so no other process is copying."""
    for draft in parent.glob(".draft-*"):
        shutil.rmtree(draft, ignore_errors=True)


def _note_source(copy: Path, model_folder: Path) -> None:
    """Write down where a copy comes from, for the advice of errors; one that cannot be written to does without."""
    with contextlib.suppress(OSError):
        (copy / SOURCE_FILE).write_text(str(model_folder.absolute()), "utf-8")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file the store needs, by path within the model folder."""
    files = [folder / "config.json", folder / FILE, *(folder / "params").rglob("*")]
    return {str(f.relative_to(folder)): f.stat().st_size for f in files if f.is_file()}


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _ensure_private(folder: Path) -> None:
    """Make a folder for this user alone, or raise StoreRefused when another could have put files in it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StoreRefused(
            f"{folder} has owner {found.st_uid} and mode {stat.filemode(found.st_mode)}; it must be a "
            f"folder of user {os.getuid()} with mode drwx------. Delete it, or give another place."
        )


@contextlib.contextmanager
def _exclusive(parent: Path) -> Iterator[None]:
    """Hold the lock of the folder of copies: one process copies and prunes at a time, others wait and find its copy."""
    with (parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _copy(model_folder: Path, place: Path, files: list[str]) -> None:
    """Copy into a draft and rename: a reader sees all of it or nothing."""
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=place.parent))
    try:
        for file in files:
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model_folder / file, draft / file)
        (draft / LOCK_FILE).touch()
        _note_source(draft, model_folder)
        if place.is_dir():
            shutil.rmtree(place)
        os.rename(draft, place)
    except OSError as error:
        raise CheckpointError(f"{model_folder} cannot be copied to {place}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
